"""What lies where in a run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from loramix.errors import ConfigError, StorageError
from loramix.processes import writes


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    config.yaml       the settings as they were resolved
    environment.json  versions and machine
    log.jsonl         one line per log entry of every stage
    data.json         rows, tokens and what the length limit cut, by domain
    experts/NAME/     stage 1: each expert alone (the single LoRA)
    longer/NAME/      control: the same, trained as long as stage 2
    mixed/            control: one LoRA on all domains
    model/            the method's adapter, loadable by PEFT
    prompts.jsonl     some training prompts of each domain, for experts that join later
    results.json      what was measured
    progress.json     which parts are done, and what the run was begun as
    checkpoints/      of the stage that trains
    abstention.json   how well prompts that no expert fits are told apart, if it was calibrated
    """

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def prompts(self) -> Path:
        return self.path / "prompts.jsonl"

    @property
    def abstention(self) -> Path:
        return self.path / "abstention.json"

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def mixed(self) -> Path:
        return self.path / "mixed"

    def expert(self, name: str) -> Path:
        return self.path / "experts" / name

    def longer(self, name: str) -> Path:
        return self.path / "longer" / name

    def create(self) -> None:
        """Makes the folder.

        Raises:
            ConfigError: it holds a run already, or cannot be made.
        """
        if self.config.exists() or self.log.exists():
            raise ConfigError(
                f"output_dir = {str(self.path)!r} holds a run already. Go on with it by --resume, name another "
                "folder, or remove this one."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output_dir = {str(self.path)!r} cannot be made ({error.strerror}).") from error

    def clear(self) -> None:
        """Removes the run, and nothing else that lies in its folder."""
        written = (self.config, self.environment, self.log, self.data, self.prompts, self.results, self.progress)
        for file in (*written, self.abstention):
            file.unlink(missing_ok=True)
        for folder in (self.model, self.mixed, self.checkpoints, self.path / "experts", self.path / "longer"):
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps others from writing a run here; the lock ends with the process, however it ends. Of several processes
        that train together the first holds it.

        Raises:
            ConfigError: somebody else does, or a link in it leads elsewhere.
            StorageError: the folder cannot be made.
        """
        if not writes():
            yield
            return
        file = self.path / ".lock"
        _check_links(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(file)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"{self.path}: another loramix is at work here ({file} is held). Wait for it, or name another folder."
            ) from error
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be written ({error.strerror}). Name another output_dir."
            ) from error
        try:
            yield
        finally:
            lock.release()
            there = [one.name for one in self.path.iterdir()] if self.path.is_dir() else []  # or somebody removed it
            if there == [file.name]:  # nothing was written, so nothing stays
                file.unlink()
                self.path.rmdir()

    @staticmethod
    def opened(path: str | Path) -> RunFolder:
        """Returns a finished run's folder.

        Raises:
            ConfigError: there is no run, or a link in it leads elsewhere.
        """
        run = RunFolder(Path(path))
        _check_links(run.path)
        if not run.config.is_file():
            raise ConfigError(
                f"{path}: no run here (config.yaml is missing). Expected the output_dir of `loramix train`."
            )
        return run


def _check_links(folder: Path) -> None:
    """A run may come from anybody, and be written by anybody in a folder that is shared: what is read and written is in
    it, and nowhere a link in it leads to."""
    inside = folder.resolve()
    for one in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if one.is_symlink() and not one.resolve().is_relative_to(inside):
            raise ConfigError(
                f"{one}: is a link to {one.resolve()}, out of the run's folder. Put the file or folder itself here."
            )


@contextmanager
def disk_told(path: Path) -> Iterator[None]:
    """Turns what a disk refuses inside into an error that says so. What is read was checked before.

    Args:
        path: where the work is.

    Raises:
        StorageError: full, read-only, gone.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise StorageError(
            f"{where}: {error.strerror or error}. What was written before is as it was; mend the disk, then go on with "
            "--resume."
        ) from error
    except SafetensorError as error:
        if "os error" not in str(error):
            raise
        raise StorageError(f"{path}: {error}. Make room or mend the disk, then go on with --resume.") from error


def write_json(path: Path, content: Any) -> None:
    """Writes JSON with sorted keys left as given, readable by people; the file appears whole or not at all."""
    write_text_safely(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text_safely(path: Path, text: str) -> None:
    """Writes a text file that is the old or the new one whatever happens: never half, never empty. Of several processes
    the first alone does."""
    if writes():
        with staged_text(path, text):
            pass


@contextmanager
def staged_text(path: Path, text: str) -> Iterator[None]:
    """Writes a text file beside its place before what is inside, and puts it there after; not if that fails."""
    making = path.with_name(path.name + ".making")
    try:
        with making.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield
        making.replace(path)
    finally:
        making.unlink(missing_ok=True)
