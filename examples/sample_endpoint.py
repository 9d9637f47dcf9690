"""Adaptive sampling from any OpenAI-compatible endpoint that has /v1/completions; nothing is trained.

    python examples/sample_endpoint.py --server http://host:8000 --prompts examples/problems.jsonl
    python examples/sample_endpoint.py --server http://host:8000 --prompts examples/problems.jsonl --tokenizer org/model --tensors step.pt

With a vLLM server, or with the model's tokenizer, completions have token ids, and --tensors keeps what a training loop needs of them.
OPENAI_API_KEY is the endpoint's key, if it wants one.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch

import reinforce_ada
from reinforce_ada.errors import EngineLost, InputError
from reinforce_ada.rewards import number_match
from reinforce_ada.training.task_files import question_of, read_records
from reinforce_ada.types import Prompt


def main(given: argparse.Namespace) -> None:
    """Sample one step, and print a line for each prompt."""
    tokenizer = None
    if given.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    prompts = []
    for i, record in enumerate(read_records(given.prompts, needs_answer=True)):
        text = question_of(record)
        ids = tuple(tokenizer.encode(text, add_special_tokens=False)) if tokenizer else ()
        prompts.append(Prompt(str(i), ids, text=text, data=record))
    policy = reinforce_ada.preset(given.preset)
    settings = {"model": given.model, "tokenizer": tokenizer, "max_tokens": given.max_tokens, "max_num_seqs": 16}
    with closing(reinforce_ada.HttpEngine(given.server, **settings, say=print)) as engine:
        result = reinforce_ada.run(reinforce_ada.AdaptiveSampler(prompts, policy), engine, number_match)
    for pool in result.pools:
        print(pool)
    print(result)
    if given.tensors:
        step = result.to_tensors(policy)
        torch.save(asdict(step), given.tensors)
        print(f"{step} in {given.tensors}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True)
    parser.add_argument("--model", default="", help="where the endpoint has several")
    parser.add_argument("--tokenizer", default="", help="the model's folder or hub id, for token ids of endpoints that give none")
    parser.add_argument("--preset", default="reinforce-ada-balance")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE.jsonl", help="a prompt and its answer in each line")
    parser.add_argument("--tensors", type=Path, metavar="FILE.pt", help="keep the tensors of the step")
    try:
        main(parser.parse_args())
    except (InputError, EngineLost) as error:
        sys.exit(str(error))
