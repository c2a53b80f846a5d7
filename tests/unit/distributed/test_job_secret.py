"""The secret of a job: one for all ranks of a user, and nobody else's."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading

import pytest

from ssgen_ds.distributed import job_secret as secrets
from ssgen_ds.errors import UserError
from tests.support.launch import environment


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv(secrets.SECRET_VARIABLE, raising=False)
    monkeypatch.setenv("SSGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(secrets.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    return tmp_path / "cache"


def test_ranks_that_come_at_once_have_one_secret(cache):
    code = "from ssgen_ds.distributed.job_secret import job_secret; print(job_secret().hex())"
    many = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment(SSGEN_CACHE=str(cache)), stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    assert len({process.communicate(timeout=60)[0] for process in many}) == 1
    assert [(file.name, file.stat().st_mode & 0o777) for file in cache.iterdir()] == [(secrets.SECRET_FILE, 0o600)]


def test_one_that_others_can_read_is_none(cache):
    first = secrets.job_secret()
    (cache / secrets.SECRET_FILE).chmod(0o644)
    assert secrets.job_secret() != first, "the one in the folder for temporary files"


def test_no_place_for_a_secret(cache, tmp_path):
    cache.write_text("a file")
    (tmp_path / "tmp").write_text("a file")
    with pytest.raises(UserError, match=r"SSGEN_JOB_SECRET to the same random text(.|\n)*cache: (.|\n)*tmp"):
        secrets.job_secret()


def test_the_launchers_secret_counts_first(cache, monkeypatch):
    monkeypatch.setenv(secrets.SECRET_VARIABLE, "0123456789abcdef")
    assert secrets.job_secret() == hashlib.sha256(b"0123456789abcdef").digest()
    assert not cache.exists()
    monkeypatch.setenv(secrets.SECRET_VARIABLE, "short")
    with pytest.raises(UserError, match="must have 16 characters"):
        secrets.job_secret()


def test_the_secret_is_the_digest_of_the_file(cache):
    first = secrets.job_secret()
    text = (cache / secrets.SECRET_FILE).read_text()
    assert len(text) == 64 and bytes.fromhex(text), "32 random bytes"
    assert first == secrets.job_secret() == hashlib.sha256(text.encode()).digest()
    (cache / secrets.SECRET_FILE).unlink()
    assert secrets.job_secret() != first


def test_a_link_is_not_followed(cache, tmp_path):
    (tmp_path / "elsewhere").write_text("0" * 64)
    (tmp_path / "elsewhere").chmod(0o600)
    cache.mkdir()
    (cache / secrets.SECRET_FILE).symlink_to(tmp_path / "elsewhere")
    assert secrets.job_secret() != hashlib.sha256(b"0" * 64).digest()
    assert list((tmp_path / "tmp").glob("ssgen-ds-*/job-secret-*")), "it is kept in the other place"


def test_a_file_that_another_rank_is_filling_is_waited_for(cache):
    cache.mkdir()
    file = cache / secrets.SECRET_FILE
    file.touch(0o600)
    filling = threading.Timer(0.3, file.write_text, args=["f" * 64])
    filling.start()
    assert secrets.job_secret() == hashlib.sha256(b"f" * 64).digest()
    filling.join()


def test_a_file_that_was_cut_short_is_named(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "_WAIT_SECONDS", 0.1)
    (tmp_path / "tmp").write_text("a file")
    cache.mkdir()
    (cache / secrets.SECRET_FILE).touch(0o600)
    (cache / secrets.SECRET_FILE).write_text("f" * 63)
    with pytest.raises(UserError, match=f"cache: {secrets.SECRET_FILE} there was cut short; remove it"):
        secrets.job_secret()
