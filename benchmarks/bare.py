"""What a federated round is held against: LoRA training as one writes it by hand, and as ``peft`` does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common import seconds_of
from benchmarks.work import TARGETS
from fedfm.core.tree import Tree

LR, MAX_NORM = 1e-3, 1.0


class LoRALinear(nn.Module):
    """``W x + s B A x``, with the scaling and the sum folded into the second product."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / r
        self.a = nn.Parameter(torch.zeros(r, base.in_features, device=base.weight.device))
        self.b = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, a, b = self.base(x), self.a.to(x.dtype), self.b.to(x.dtype)
        h = x.flatten(0, -2) @ a.T
        return torch.addmm(y.flatten(0, -2), h, b.T, alpha=self.scale).view_as(y)


@dataclass
class Trainer:
    """A model under LoRA.

    Args:
        params: Its trainable parameters, by the name under which PEFT saves them.
        loss: Of a batch of token ids ``(rows, length)``.
        adamw: Which of torch's implementations is fastest here, ``fused`` or ``foreach``.
    """

    params: dict[str, nn.Parameter]
    loss: Callable[[torch.Tensor], torch.Tensor]
    adamw: str

    @staticmethod
    def by_hand(model: Any, r: int = 8, alpha: float = 16.0) -> Trainer:
        """A plain PyTorch training loop: logits only where there is a target, gradients only for A and B."""
        params: dict[str, nn.Parameter] = {}
        for name, module in list(model.named_modules()):
            if name.rpartition(".")[2] in TARGETS:
                lora = LoRALinear(module, r, alpha)
                model.set_submodule(name, lora)
                params |= {f"base_model.model.{name}.lora_A.weight": lora.a, f"base_model.model.{name}.lora_B.weight": lora.b}

        def loss(ids: torch.Tensor) -> torch.Tensor:
            hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
            return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), ids[:, 1:].flatten())

        return Trainer(params, loss, fastest_adamw(params.values()))

    @staticmethod
    def with_peft(model: Any, r: int = 8, alpha: float = 16.0) -> Trainer:
        """The same through ``peft`` and the model's own loss."""
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules=list(TARGETS), bias="none"))
        params = {name.replace(".default.", "."): p for name, p in wrapped.named_parameters() if p.requires_grad}
        return Trainer(params, lambda ids: wrapped(input_ids=ids, labels=ids).loss, fastest_adamw(params.values()))

    def compiled(self) -> Trainer:
        """The same with its loss compiled by torch; lengths and rows may change, no autotuning."""
        return replace(self, loss=torch.compile(self.loss, dynamic=True))

    @torch.no_grad()
    def set(self, values: Tree) -> None:
        """Starts from these."""
        for name, parameter in self.params.items():
            parameter.copy_(values[name])

    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh AdamW."""
        return adamw(self.params.values(), self.adamw)

    def train(self, batches: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
        """A step for each batch, done when this returns; the last loss."""
        loss = torch.zeros(())
        for ids in batches:
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss(ids)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.params.values(), MAX_NORM)
            optimizer.step()
        synchronize(loss.device)
        return loss.item()

    def one_by_one(self, start: Tree, batches_c: Sequence[Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Federated averaging without a framework: each client in turn from ``start``, then the mean."""
        total = {name: torch.zeros_like(p) for name, p in self.params.items()}
        for batches in batches_c:
            self.set(start)
            self.train(batches, self.optimizer())
            for name, p in self.params.items():
                total[name] += p.detach()
        return {name: value / len(batches_c) for name, value in total.items()}


def adamw(params: Iterable[nn.Parameter], kind: str) -> torch.optim.Optimizer:
    """torch's AdamW, ``fused`` or ``foreach``."""
    return torch.optim.AdamW(params, LR, weight_decay=0.0, fused=kind == "fused", foreach=kind == "foreach")


def fastest_adamw(params: Iterable[nn.Parameter]) -> str:
    """The kind that takes least time on tensors of these shapes."""
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    for copy in copies:
        copy.grad = torch.randn_like(copy)

    def seconds(kind: str) -> float:
        def step() -> None:
            optimizer.step()
            synchronize(copies[0].device)

        optimizer = adamw(copies, kind)
        return min(seconds_of(step) for _ in range(5))

    return min(("fused", "foreach"), key=seconds)


def synchronize(device: torch.device) -> None:
    """Waits for an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def huggingface(model: Any, batches: Sequence[torch.Tensor], folder: Path) -> Callable[[], object]:
    """``transformers.Trainer`` with ``peft``, as people would run it: these batches' rows once, shuffled, with AdamW and the same rate and clipping.

    Args:
        folder: Where it may write.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, TrainingArguments
    from transformers import Trainer as HFTrainer

    wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16.0, target_modules=list(TARGETS), bias="none"))
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=len(batches[0]), max_steps=len(batches), learning_rate=LR, weight_decay=0.0,
        max_grad_norm=MAX_NORM, lr_scheduler_type="constant", logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=batches[0].device.type == "cpu", bf16=model.dtype == torch.bfloat16,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.cat(list(batches)).cpu()]

    def work() -> None:
        # One for each call: a second ``train`` of the same would go on with its scheduler.
        trainer = HFTrainer(model=wrapped, args=arguments, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        synchronize(batches[0].device)

    return work
