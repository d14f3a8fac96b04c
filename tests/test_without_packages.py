"""What trains a model works where datasets, mteb and pydantic are not there."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "without_packages.py"


def test_a_step_of_each_stage_is_made_without_datasets_mteb_and_pydantic(tmp_path):
    """Stage I by its trainer, with words and texts; Stage II by its loss, with LoRA; weights change, all is finite."""
    subprocess.run([sys.executable, SCRIPT, tmp_path], check=True)
