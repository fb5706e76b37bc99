"""The run card names this program, and no other."""

import subprocess

import pytest

from esper_jax.run import provenance


def git(folder, *arguments):
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def package(tmp_path):
    """A package in a checkout that does not track it, as when it is installed in a `.venv` there."""
    package = tmp_path / ".venv" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    (tmp_path / "other.py").touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "other.py")
    git(tmp_path, "commit", "-q", "-m", "other")
    return package


def test_the_commit_is_the_packages_own(package, monkeypatch):
    assert provenance.git(package) is None
    git(package, "add", "-f", "__init__.py")
    git(package, "commit", "-q", "-m", "own")
    own = provenance.git(package)
    assert len(own["commit"]) == 40 and own["changed"] is False
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook
    assert provenance.git(package) == own
    (package / "__init__.py").write_text("x = 2\n")
    assert provenance.git(package)["changed"] is True


def test_the_source_has_a_hash_of_its_own(package, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", package)
    first = provenance.source()
    assert list(first) == ["sha256"] and len(first["sha256"]) == 64
    (package / "notes.txt").touch()
    assert provenance.source() == first
    (package / "__init__.py").rename(package / "b.py")
    moved = provenance.source()
    (package / "b.py").write_text("x = 2\n")
    assert len({first["sha256"], moved["sha256"], provenance.source()["sha256"]}) == 3


def test_equal_data_are_equal_in_either_layout():
    assert provenance.same_data("md5:1 (the official CIFAR-10)", "md5:1 (not verified to be the official CIFAR-10)")
    assert not provenance.same_data("md5:1 (the official CIFAR-10)", "md5:2 (the official CIFAR-10)")
