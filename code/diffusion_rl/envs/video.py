"""Videos of environments, written with imageio's ffmpeg or with OpenCV, whichever is installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError


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
    """Renders simulator states off screen, the camera following the body, and writes them to an mp4 file."""

    def __init__(self, model: Any, path: str | Path, fps: int, width: int = 320, height: int = 240):
        import mujoco

        if sys.platform == "linux" and not (os.environ.get("MUJOCO_GL") or os.environ.get("DISPLAY")):
            raise UserError(
                "env.save_video=true needs a way to render without a display: set MUJOCO_GL=egl or MUJOCO_GL=osmesa "
                "(Debian: libegl1 or libosmesa6)"
            )
        self._mujoco = mujoco
        self._writer = VideoWriter(path, fps)
        self._model = model
        self._data = mujoco.MjData(model)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_TRACKING
        self._camera.trackbodyid = 1
        self._camera.distance = 4.0
        self._camera.elevation = -15.0
        try:
            self._renderer = mujoco.Renderer(model, height, width)
        except Exception as error:  # whatever the graphics library raises
            self._writer.close()
            backend = os.environ.get("MUJOCO_GL", "unset")
            raise UserError(
                f"env.save_video=true: MuJoCo cannot render here (MUJOCO_GL is {backend}: {error}); "
                "set MUJOCO_GL=egl or MUJOCO_GL=osmesa and install that library"
            ) from error

    def add(self, state: np.ndarray) -> None:
        """state: full physics state [1+nq+nv]."""
        mujoco = self._mujoco
        mujoco.mj_setState(self._model, self._data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
        mujoco.mj_forward(self._model, self._data)
        self._renderer.update_scene(self._data, self._camera)
        self._writer.add(self._renderer.render())

    def close(self) -> None:
        self._writer.close()
        self._renderer.close()
