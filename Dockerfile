# docker build -t iwsft . && docker run --gpus all --ipc=host -v "$PWD:/work" -w /work -it iwsft
# The image's torch, numpy, Transformer Engine, NCCL and cuDNN stay as they are: nothing here may replace them.
ARG NGC_PYTORCH=nvcr.io/nvidia/pytorch:26.07-py3
FROM ${NGC_PYTORCH}

# NGC images bring Transformer Engine but no Megatron-Core; --no-deps, because its requirements name torch and numpy.
ARG MEGATRON_CORE=0.19.2
WORKDIR /opt/megatron-iwsft
COPY requirements-container.txt .
RUN pip install --no-cache-dir -r requirements-container.txt && pip install --no-cache-dir --no-deps "megatron-core==${MEGATRON_CORE}"

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e . && iwsft doctor

# Launchers use this interpreter instead of creating an environment.
ENV IWSFT_PYTHON=/usr/bin/python3
# One hardware queue, so that kernels run in launch order: tensor parallelism's communication overlap relies on it.
ENV CUDA_DEVICE_MAX_CONNECTIONS=1
