# One image for CPUs and for NVIDIA GPUs: PyTorch's packages bring the CUDA libraries along. See docs/container.md.
ARG BASE=debian:bookworm-slim
FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/mbs
COPY . .
RUN make .venv/installed \
    && .venv/bin/python -m pip install -q -e '.[app,pretrained]' \
    && rm -rf /root/.cache
ENV PATH=/opt/mbs/.venv/bin:$PATH MBS_HOME=/work
WORKDIR /work
ENTRYPOINT ["mbs"]
CMD ["--help"]
