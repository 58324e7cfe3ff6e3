# On NVIDIA's PyTorch image, whose torch, Transformer Engine and NCCL are built for each other:
#   docker build -t ee_tuning .
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/workspace" ee_tuning inspect MODEL
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/workspace" --entrypoint torchrun ee_tuning \
#     --nproc-per-node 8 -m ee_tuning tune job.yaml
# Any base image with Python 3.11 or later and torch 2.10 or later will do: --build-arg BASE_IMAGE=...
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE_IMAGE}

WORKDIR /opt/ee_tuning

# Dependencies first: this layer is built anew only when setup.py or the version changes, not with every edit of the sources.
# The constraint pins torch to the image's own build, so that pip installs around it or says why it can not, and never replaces it.
COPY setup.py pyproject.toml ./
COPY ee_tuning/__init__.py ee_tuning/
RUN python -c "import torch; print('torch==' + torch.__version__)" > /tmp/constraint.txt \
 && pip install --no-cache-dir --constraint /tmp/constraint.txt --editable . \
 && rm /tmp/constraint.txt

# The editable install above looks here, so the sources need no second install.
COPY . .

RUN useradd --create-home ee && mkdir -p /workspace && chown ee /workspace
USER ee
WORKDIR /workspace
ENTRYPOINT ["ee-tuning"]
