# The commands of rkif on a CPU:
#   docker build -t rkif .
#   docker run --rm -v "$PWD:/work" rkif demo
FROM python:3.12-slim AS build
# The newest versions that the image and rkif allow.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/rkif
ENV PATH=/opt/rkif/bin:$PATH
# hadolint ignore=DL3013
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN pip install --no-cache-dir '/src[hf,report,tune,sign]'

FROM python:3.12-slim
COPY --from=build /opt/rkif /opt/rkif
ENV PATH=/opt/rkif/bin:$PATH
WORKDIR /work
ENTRYPOINT ["rkif"]
