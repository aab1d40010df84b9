"""The result belongs to the rest of the world: an adapter that ``peft`` loads, a model that ``transformers`` loads."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from course import base
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from fedfm import run
from fedfm.run.result import Result

PROMPT = "def __init__(self, "


def main(quick: bool = False) -> tuple[float, str]:
    plan = base(quick)
    with TemporaryDirectory() as folder:
        out, merged = Path(folder) / "run", Path(folder) / "merged"
        for _, record in run(plan, out=out):
            print(f"round {record.round}")
        Result.open(out).export(merged, merge=True)

        tokenizer = AutoTokenizer.from_pretrained(merged)
        whole = AutoModelForCausalLM.from_pretrained(merged).eval()
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(plan.model.source), out / "model").eval()
        prompt = tokenizer(PROMPT, return_tensors="pt")
        with torch.inference_mode():
            apart = (whole(**prompt).logits - adapted(**prompt).logits).abs().max().item()
            torch.manual_seed(0)
            written = whole.generate(**prompt, max_new_tokens=30, do_sample=True, top_k=10, pad_token_id=tokenizer.pad_token_id)
        files = sorted(file.name for file in (out / "model").iterdir())
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    print(f"the adapter    {', '.join(files)}")
    print(f"adapter in peft and merged model differ by at most {apart:.1e} in any logit")
    print(f"it writes      {text!r}")
    return apart, text


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # 01 has shown what the plan check has to say
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # between peft and transformers
    disable_progress_bar()
    main()
