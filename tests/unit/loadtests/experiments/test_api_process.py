"""What measures an API process: a checkpoint with little to compute, and its report."""

import json
from pathlib import Path

from borg_serve.checkpoint.manifest import MANIFEST_FILE
from borg_serve.config import load
from loadtests.experiments import api_process
from loadtests.experiments.experiment import CONFIG


def test_api_process_measures_a_checkpoints_prompts_before_a_narrow_engine(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "config.json").write_text('{"vocab_size": 49152, "num_hidden_layers": 30}')
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors", MANIFEST_FILE):
        (given / name).write_text(name)
    folder = api_process.reshaped(given, tmp_path / "model", api_process.NARROW)
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "chat_template.jinja"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"]) == (1, 49152)
    profile = load(Path(CONFIG), api_process.settings(folder, 4, 64))
    assert (profile.engine["stream_interval"], profile.limits.concurrent, profile.model.probe) == (4, 64, None)
