"""Flower's client: ``peft`` LoRA and torch's AdamW. A module of its own, so that an actor imports it once and keeps what it caches."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


@cache
def load(folder: str, threads: int) -> tuple[Any, dict[str, torch.nn.Parameter], Any]:
    """Model, trainable parameters and everybody's tokens ``(owners, rows, length)``: once for each actor."""
    torch.set_num_threads(threads)
    base = AutoModelForCausalLM.from_pretrained(Path(folder, "base"))
    base.config.use_cache = False
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16.0, target_modules=["q_proj", "v_proj"], bias="none"))
    params = {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    return model, params, np.load(Path(folder, "tokens.npy"), mmap_mode="r")


def train(message: Message, context: Context) -> Message:
    """Ten steps, or as many as the server says, from the server's adapters."""
    config = message.content["config"]
    model, params, tokens = load(config["folder"], config["cpus"])
    rows = tokens[context.node_config["partition-id"]]
    with torch.no_grad():
        for name, value in message.content["arrays"].to_torch_state_dict().items():
            params[name].copy_(value)
    optimizer = torch.optim.AdamW(params.values(), 1e-3, weight_decay=0.0, fused=True)
    order = np.random.default_rng().permutation(len(rows)).reshape(config["steps"], config["batch"])
    for index in order:
        ids = torch.from_numpy(rows[index].astype(np.int64))
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
    content = {
        "arrays": ArrayRecord({name: p.detach() for name, p in params.items()}),
        "metrics": MetricRecord({"num-examples": len(rows), "loss": loss.item()}),
    }
    return Message(content=RecordDict(content), reply_to=message)


app = ClientApp()
app.train()(train)
