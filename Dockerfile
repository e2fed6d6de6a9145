# Build: docker build -t diffuser .        Run: python scripts/launch.py docker --dataset hopper-medium-v2
FROM tensorflow/tensorflow:2.20.0-gpu

RUN apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ffmpeg git libegl1 libgl1 libosmesa6 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /home/code
COPY setup.py pyproject.toml README.md ./
COPY code/diffusion_rl/__init__.py code/diffusion_rl/__init__.py
RUN pip install --no-cache-dir -e ".[gym,download]"
# For machines that have no checkout; elsewhere it is bound to /home/code when the container runs.
COPY . .
ENV PYTHONPATH=/home/code/code MUJOCO_GL=egl TF_CPP_MIN_LOG_LEVEL=2
