"""GGUF files that are none."""

import pytest

from foretune.errors import UserError
from foretune.models.load import load_model


@pytest.mark.parametrize("content", [b"", b"GGUFxxxx", b"GGUF" + bytes(60), b"no model at all" * 10])
def test_a_broken_gguf_file_is_told_to_the_user(content, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*bad.gguf as a GGUF model \(.+\): download it again"):
        load_model(str(tmp_path / "bad.gguf"))
    assert not list((tmp_path / "cache" / "foretune").iterdir())
