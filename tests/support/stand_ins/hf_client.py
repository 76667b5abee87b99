"""The real Hub client, in this process or in one of its own, with the stand-in for its Hub and an empty cache."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from stand_ins.hf_hub import Hub


def use_only(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client in this process ask `hub`, without a token, and keep its cache in home/hf/hub."""
    for name in ("HF_TOKEN", "MODELHUB_CACHE", "HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hf" / "hub"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_TOKEN_PATH": str(home / "no token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)


def start(hub: Hub, home: Path, program: str, **more: Any) -> subprocess.Popen[str]:
    """A Python process that runs `program`, with the same settings; its stdin and stdout are pipes."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "MODELHUB_", "http"))}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HOME": str(home)}
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, env=kept | settings | quiet, stdin=-1, stdout=-1, text=True, **more)
