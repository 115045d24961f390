# One image for CPU and GPU: the GPU one differs only in the build of torch and needs the NVIDIA runtime.
#   docker build -t htm-service .                                 the torch that constraints.txt pins, as PyPI has it
#   docker build -t htm-service --build-arg TORCH=torch==2.13.0+cpu \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .        its CPU build: no CUDA libraries
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ARG TORCH=torch
ARG TORCH_INDEX=
# For networks that terminate TLS: the path of the certificates, as pip reads it.
ARG PIP_CERT
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/htm
COPY constraints.txt ./
# torch alone first: the layer that takes minutes is built again only when the pin changes.
RUN /opt/htm/bin/pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY htm_service htm_service
COPY api api
COPY storage storage
RUN /opt/htm/bin/pip install -c constraints.txt ".[postgresql,otel]"

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin htm \
    && install -d -o htm -g htm -m 0700 /data
COPY --from=build /opt/htm /opt/htm
# Builds of torch for GPUs bring triton, which compiles what launches its kernels; without a compiler they are served slowly.
# hadolint ignore=DL3008
RUN if [ -n "$(find /opt/htm/lib -path '*/site-packages/triton')" ]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
# There is no key in the image: without HTM_API_KEY, or a file HTM_API_KEY_FILE, the server refuses to start and says so.
# HTM_KERNEL_CACHE, TRITON_CACHE_DIR: kernels are compiled for the machine that they run on, and kept.
ENV PATH=/opt/htm/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HTM_HOST=0.0.0.0 \
    HTM_PORT=8000 \
    HTM_DATA=/data \
    HTM_KERNEL_CACHE=/data/kernels \
    TRITON_CACHE_DIR=/data/triton
USER 10001:10001
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# http.client, because urllib would send the question through a proxy that the environment names.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import http.client, os, ssl, sys; at = '127.0.0.1', int(os.environ['HTM_PORT']); c = http.client.HTTPSConnection(*at, timeout=4, context=ssl._create_unverified_context()) if os.environ.get('HTM_TLS_CERT') else http.client.HTTPConnection(*at, timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["htm-service"]
CMD ["serve"]
