"""Checkpoints that the commands are tried on."""

from pathlib import Path

import pytest

from tests.support.checkpoint_writer import TinySpec, write_checkpoint

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights with a chat template; its tokens are single characters."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny", TinySpec(chat_template=TEMPLATE))
