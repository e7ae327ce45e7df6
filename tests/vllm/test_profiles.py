"""Every profile in configs/ holds arguments that vLLM takes."""

from pathlib import Path

import pytest

from borg_serve.config import load
from borg_serve.engine import arguments

CONFIGS = Path(__file__).parents[2] / "configs"
PROFILES = sorted(CONFIGS.glob("*.yaml"))
IDENTITIES = sorted(CONFIGS.glob("identity/*.md"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profile_loads_and_vllm_takes_its_engine_section(path: Path) -> None:
    config = load(path, check_engine=arguments.field_problems)
    parsed = arguments.namespace(arguments.build(config, config.model.path, "{{ messages }}"))
    assert parsed.enable_prefix_caching is True
    assert config.identity.prompt in IDENTITIES
