# One image for CPU and GPU: the GPU one differs only in the build of torch and needs the NVIDIA runtime.
#   docker build -t htm-service .                                             the torch that constraints.txt pins
#   docker build -t htm-service --build-arg TORCH=torch==2.13.0+cpu \
#       --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .    its CPU build, gigabytes smaller
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ARG TORCH=torch
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/htm
COPY constraints.txt ./
# torch alone first: the layer that takes minutes is built again only when the pin changes.
RUN /opt/htm/bin/pip install -c constraints.txt "${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY htm_service htm_service
COPY api api
COPY storage storage
RUN /opt/htm/bin/pip install -c constraints.txt .

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin htm \
    && install -d -o htm -g htm -m 0700 /data
COPY --from=build /opt/htm /opt/htm
# Inside a container the published port decides who can call: compose.yaml publishes it on 127.0.0.1 only.
ENV PATH=/opt/htm/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HTM_HOST=0.0.0.0 \
    HTM_PORT=8000 \
    HTM_DATA=/data \
    HTM_INSECURE=true
USER 10001:10001
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['HTM_PORT'] + '/readyz', timeout=4)"]
ENTRYPOINT ["htm-service"]
CMD ["serve"]
