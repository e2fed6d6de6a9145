"""Videos of environments, written with imageio's ffmpeg or with OpenCV, whichever is installed."""

from __future__ import annotations

import contextlib
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.envs import processes


class VideoWriter:
    """Writes RGB frames [Hi, Wi, 3] uint8 to an mp4 file."""

    def __init__(self, path: str | Path, fps: int):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._write, self._close = _imageio(str(path), fps) or _opencv(str(path), fps) or _missing()

    def add(self, frame: np.ndarray) -> None:
        self._write(np.asarray(frame, dtype=np.uint8))

    def close(self) -> None:
        self._close()


def _imageio(path: str, fps: int) -> tuple[Any, Any] | None:
    try:
        import imageio
        import imageio_ffmpeg  # noqa: F401 - imageio's mp4 writer
    except ImportError:
        return None
    writer = imageio.get_writer(path, fps=fps, macro_block_size=1)
    return writer.append_data, writer.close


def _opencv(path: str, fps: int) -> tuple[Any, Any] | None:
    try:
        import cv2
    except ImportError:
        return None
    writer: list[Any] = []

    def write(frame: np.ndarray) -> None:
        if not writer:
            size = frame.shape[1::-1]
            writer.append(cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), fps, size))
        writer[0].write(frame[..., ::-1])

    return write, lambda: [one.release() for one in writer]


def _missing() -> tuple[Any, Any]:
    raise UserError(
        'env.save_video=true needs a video writer: pip install "imageio[ffmpeg]" (or opencv-python-headless)'
    )


class LocomotionRecorder:
    """Films simulator states of a locomotion task from a helper process, the camera following the body.

    Rendering has a process of its own because Mesa's software renderer crashes in one that has loaded TensorFlow.
    """

    def __init__(self, task: str, path: str | Path, fps: int, width: int = 320, height: int = 240):
        # without a display, EGL is the likeliest to work
        self._backend = os.environ.get("MUJOCO_GL") or ("" if os.environ.get("DISPLAY") else "egl")
        arguments = (task, str(path), fps, width, height, self._backend)
        self._process, self._connection = processes.start(_film, *arguments)
        self._confirm()

    def add(self, state: np.ndarray) -> None:
        """state: full physics state [1+nq+nv]."""
        with contextlib.suppress(OSError):  # the process died; closing says why
            self._connection.send(state)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._confirm()
        self._connection.close()
        self._process.join()

    def _confirm(self) -> None:
        try:
            problem = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            problem = f"the rendering process ended with exit code {self._process.exitcode}"
        if isinstance(problem, UserError):
            raise problem
        if problem is not None:
            raise UserError(
                f"env.save_video=true: cannot render here with MUJOCO_GL={self._backend or 'unset'} ({problem}); "
                "set MUJOCO_GL=egl or MUJOCO_GL=osmesa and install that library (Debian: libegl1 or libosmesa6)"
            )


def _film(connection: Connection, task: str, path: str, fps: int, width: int, height: int, backend: str) -> None:
    """Runs in the helper process: render each state received until None comes; answer None or what went wrong, once
    when ready and once when done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if backend:
        os.environ["MUJOCO_GL"] = backend  # before the first import of mujoco
    try:
        import mujoco

        from diffusion_rl.envs.locomotion import load_model

        writer, model = VideoWriter(path, fps), load_model(task)
        data, camera = mujoco.MjData(model), mujoco.MjvCamera()
        camera.type = mujoco.mjtCamera.mjCAMERA_TRACKING
        camera.trackbodyid, camera.distance, camera.elevation = 1, 4.0, -15.0
        renderer = mujoco.Renderer(model, height, width)
        connection.send(None)
        while (state := connection.recv()) is not None:
            mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
            mujoco.mj_forward(model, data)
            renderer.update_scene(data, camera)
            writer.add(renderer.render())
        writer.close()
        connection.send(None)
    except EOFError:  # the parent is gone
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(
                error if isinstance(error, UserError) else f"{type(error).__name__}: {error}".split("\n")[0]
            )
