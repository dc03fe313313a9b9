"""The kernel benchmark, where there is no GPU: it checks, times, fits a line and leaves a record."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_a_shape_on_the_cpu(tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, SCRIPTS / "bench_kernels.py", "--device", "cpu", "--only", "cpu 512"]
    done = subprocess.run(
        [*command, "--rounds", "2", "--threads", "1", "--feedback", "--output", record],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(record.read_text())["table"]
    assert [row["keep"] for row in table if row["impl"] == "cpu" and "keep" in row] == [
        1,
        0.5,
        0.35,
        0.25,
        0.15,
    ]
    assert any("slope" in row for row in table) and any(row["impl"] == "cpu + next plan" for row in table)
