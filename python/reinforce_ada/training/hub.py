"""Uploading the trained model of a run to the Hugging Face Hub. Imports no torch."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

from reinforce_ada.config import load_saved
from reinforce_ada.errors import InputError, needs
from reinforce_ada.outside import one_line
from reinforce_ada.training.built_in import ADAPTER_CONFIG
from reinforce_ada.training.card import CARD, base_of
from reinforce_ada.training.run_folder import CONFIG

_WHERE = "hub"


def check(repo: str) -> None:
    """Raise InputError for what would keep an upload from ever succeeding: no client, no name of a repository, no token, no network."""
    needs(_WHERE, "huggingface_hub")
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise InputError(_WHERE, f"{one_line(repr(repo), 100)} names no repository", "org/name, or name for your own") from e
    if get_token() is None:
        raise InputError(_WHERE, "there is no token", "one that may write, in HF_TOKEN or from `hf auth login`")
    if is_offline_mode():
        raise InputError(_WHERE, "HF_HUB_OFFLINE is set", "a process that may use the network", "unset it")


def push(run: Path, repo: str) -> str:
    """Upload RUN/model with its card as one commit, and return the address of the repository, which is made private if it is new.

    Nothing in the run changes, so a push that failed can be repeated.
    Raises: InputError in one line for whatever keeps the model from being uploaded.
    """
    check(repo)
    model = run / "model"
    if not os.path.isfile(model / CARD):
        hint = "train writes it at the end of a run; train --resume finishes one"
        raise InputError(_WHERE, f"{one_line(str(run))} has no model with a card", "the folder of a finished run", hint)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        files = sorted(path for path in model.rglob("*") if path.is_file())
        added = [CommitOperationAdd(str(path.relative_to(model)), _public(path, run)) for path in files]
        made = api.create_repo(repo, private=True, exist_ok=True)
        api.create_commit(made.repo_id, added, commit_message=f"{run.resolve().name}, by reinforce_ada")
    except Exception as e:  # the client and what is below it have many errors, and none of them is the run's
        given = f"{repo} has not been pushed: {one_line(f'{type(e).__name__}: {e}')}"
        hint = f"the run is whole; `reinforce-ada push {shlex.quote(str(run))} --to {repo}` tries again"
        raise InputError(_WHERE, given, "a token that may write there, and a network", hint) from e
    return str(made)


def _public(path: Path, run: Path) -> Path | bytes:
    """Return a file, or its content if adapters name a folder of this machine as their base model: then with the name in the card."""
    if path.name != ADAPTER_CONFIG:
        return path
    found = json.loads(path.read_text())
    if os.path.isabs(str(found.get("base_model_name_or_path"))):
        found["base_model_name_or_path"] = base_of(load_saved(run / CONFIG))[0]
    return json.dumps(found, indent=2).encode()
