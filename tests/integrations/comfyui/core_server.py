"""ComfyUI's server with the pack, in a folder of its own: it runs workflows that are sent to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


class Server:
    """A context manager.

    Args:
        root: ComfyUI's folder.
        base: an empty folder for custom nodes, inputs and outputs.
    """

    def __init__(self, root: Path, base: Path) -> None:
        for name, line in {
            "dit_accel": "from dit_accel.integrations.comfyui import comfy_entrypoint",
            "for_tests": "from core_pack import comfy_entrypoint",
        }.items():
            folder = base / "custom_nodes" / name
            folder.mkdir(parents=True)
            (folder / "__init__.py").write_text(f"{line}\n")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._command = [
            sys.executable, str(root / "main.py"), "--cpu", "--disable-api-nodes", "--listen", "127.0.0.1",
            "--port", str(self.port), "--base-directory", str(base), "--database-url", "sqlite:///:memory:",
        ]  # fmt: skip
        self._log = base / "log.txt"

    def __enter__(self) -> Server:
        with self._log.open("w") as log:
            env = {**os.environ, "PYTHONPATH": str(_HERE)}
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=env)
        deadline = time.monotonic() + 120
        while True:
            try:
                self.get("/system_stats")
                return self
            except urllib.error.URLError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise RuntimeError(f"ComfyUI did not start:\n{self.log()}") from None
                time.sleep(0.3)

    def __exit__(self, *args: Any) -> None:
        self._process.terminate()
        self._process.wait()

    def log(self) -> str:
        return self._log.read_text()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
            return json.load(answer)

    def post(self, path: str, given: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(given).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from None

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Run a workflow in ComfyUI's API format, and give what its output nodes show, by their ids."""
        number = self.post("/prompt", {"prompt": workflow})["prompt_id"]
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            history = self.get(f"/history/{number}")
            if number in history:
                found = history[number]
                if found["status"]["status_str"] != "success":
                    raise RuntimeError(f"{found['status']['messages']}\n{self.log()}")
                return found["outputs"]
            time.sleep(0.1)
        raise RuntimeError(f"no answer:\n{self.log()}")
