# CPU:   docker build -t memladder .
# CUDA:  docker build -t memladder:cuda --build-arg EXTRA=cuda .
#        docker run --rm --gpus all --pid=host -v "$PWD:/work" memladder:cuda doctor
# Without --pid=host NVML may know a worker under a number that says nothing inside the container
# (docs/concepts/measuring.md). PyTorch's wheels bring CUDA's libraries; the host brings the driver.
FROM python:3.12-slim-bookworm

# g++: PyTorch-Inductor's CPU kernels; libc6-dev and python's headers come with the two.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

ARG EXTRA=cpu
WORKDIR /opt/memladder
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN python -m pip install --no-cache-dir ".[${EXTRA}]"

# A record names the commit; an image has no work tree.
ARG COMMIT=
ENV MEMLADDER_COMMIT=${COMMIT} \
    MEMLADDER_CACHE=/cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

RUN useradd --create-home --uid 1000 memladder \
    && mkdir -p /cache /work \
    && chown memladder:memladder /cache /work
USER memladder
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["memladder"]
CMD ["--help"]
