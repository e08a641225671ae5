# Lorikeet in a container. Two variants from one file:
#   docker build -t lorikeet .                                CPU: no CUDA library inside
#   docker build -t lorikeet:cuda --build-arg VARIANT=cuda --build-arg EXTRA_PACKAGES="gcc libc6-dev" .
#                                                             GPU: PyPI's torch brings its own CUDA runtime
#
#   docker run -p 8000:8000 -e LORIKEET_API_KEY="$(openssl rand -hex 24)" --read-only --tmpfs /tmp -v lorikeet:/var/lib/lorikeet lorikeet
#   docker run --gpus all ... -v hf:/var/cache/huggingface lorikeet:cuda serve --base Qwen/Qwen2.5-VL-3B-Instruct
#
# It listens on every address, so it refuses to start without a key (or --insecure-no-auth). No weights are inside but
# the embedded base's few megabytes; anything from the hub goes to the cache volume. docs/operations.md has the rest.

ARG PYTHON=3.11

# ---- the builder: everything that compiles or downloads stays here
FROM python:${PYTHON}-slim AS builder
ARG VARIANT=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# The kernels of a CPU are compiled at install; the image has what came of it and not the compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/lorikeet
WORKDIR /src
# The libraries first: this layer is built again only when a pin or a dependency changes.
COPY pyproject.toml constraints.txt ./
RUN case "$VARIANT" in cpu) index="--extra-index-url $TORCH_INDEX" ;; cuda) index="" ;; \
      *) echo "VARIANT is cpu or cuda, not $VARIANT" >&2; exit 1 ;; esac \
 && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > dependencies.txt \
 && /opt/lorikeet/bin/pip install $index --constraint constraints.txt --requirement dependencies.txt
COPY . .
RUN /opt/lorikeet/bin/pip install --no-deps .

# ---- the image: Python, the libraries, a user without rights; no compiler, no package index, no source tree
FROM python:${PYTHON}-slim AS runtime
# Runtime libraries only. On a GPU Triton's kernels compile at start, which takes a C compiler here; without one the server
# says kernels.refused and takes bitsandbytes and torch. With: --build-arg EXTRA_PACKAGES="gcc libc6-dev".
ARG EXTRA_PACKAGES=""
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 $EXTRA_PACKAGES \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --home-dir /var/lib/lorikeet --shell /usr/sbin/nologin lorikeet \
 && install --directory --owner=lorikeet /var/lib/lorikeet /var/cache/huggingface /adapters
COPY --from=builder /opt/lorikeet /opt/lorikeet
# The samples stand where yours go: mount a folder of PEFT folders over /adapters.
COPY --chown=lorikeet adapters/samples /adapters
ENV PATH=/opt/lorikeet/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/var/cache/huggingface \
    LORIKEET_HOST=0.0.0.0 \
    LORIKEET_PORT=8000 \
    LORIKEET_STATE_DIR=/var/lib/lorikeet \
    LORIKEET_ADAPTER_ROOT=/adapters \
    LORIKEET_LOG_FORMAT=json
USER lorikeet
WORKDIR /var/lib/lorikeet
VOLUME ["/var/lib/lorikeet", "/var/cache/huggingface", "/adapters"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# /health never touches the device and asks for no key. A large base takes minutes to load: hence the start period.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"LORIKEET_PORT\"]}/health', timeout=2)"]
ENTRYPOINT ["lorikeet"]
CMD ["serve"]
