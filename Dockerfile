# Manta and all that it serves with.
#
#   docker build --target cpu -t manta:cpu .      # docker run -p 8000:8000 --shm-size=4g manta:cpu
#   docker build --target cuda -t manta:cuda .    # the image of docs/examples/rayservice.yaml

FROM python:3.11-slim AS cpu
# g++ compiles the CPU kernels, for all processors; setpriv, of util-linux, ends HAProxy with its owner.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ util-linux \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home manta
COPY . /opt/manta
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu /opt/manta
USER manta
EXPOSE 8000
ENTRYPOINT ["manta"]
CMD ["serve", "--host", "0.0.0.0"]

FROM rayproject/ray:2.60.0-py311-gpu AS cuda
COPY --chown=ray . /home/ray/manta
RUN pip install --no-cache-dir '/home/ray/manta[cuda]'
EXPOSE 8000
CMD ["manta", "serve", "--host", "0.0.0.0"]
