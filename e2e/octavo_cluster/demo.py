"""`make demo`: from nothing to an answer streamed out of a real pod, told step by step. Run twice, it works twice."""

from __future__ import annotations

import contextlib
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import openai

from octavo_cluster import backend, binaries, model, paths, prepare, product, storage
from octavo_cluster.errors import CommandFailed, HarnessError
from octavo_cluster.progress import duration, say
from octavo_operator import names

if TYPE_CHECKING:
    from collections.abc import Iterator
    from subprocess import CompletedProcess

    from octavo_cluster.backend import Cluster

NAMESPACE = "demo"
CLAIM = "models"  # the sample's
SERVICE = "smollm2"  # the sample's
SAMPLE = paths.PROJECT / "manifests" / "samples" / "inferenceservice.yaml"
QUESTION = "Why is the sky blue? Answer in two sentences."
READY_SECONDS = 300
STEPS = 7


def run() -> None:
    """Tell the story.

    Raises:
        HarnessError: a step failed; everything stays as it is, so that one can look.
    """
    begin = time.monotonic()
    with _step(1, "Programs, images and the model"):
        cluster = backend.choose()
        say(f"    the cluster is made by {_maker(cluster)}")
        operator, engine = prepare.everything()
    with _step(2, "A Kubernetes cluster of one node"):
        cluster.up()
        cluster.load_image(operator)
    with _step(3, f"The model's file, in a claim of the namespace {NAMESPACE}"), ThreadPoolExecutor() as pool:
        engine_loaded = pool.submit(cluster.load_image, engine)  # side by side with the copy
        product.make_namespace(cluster, NAMESPACE)
        storage.put_file(
            cluster,
            namespace=NAMESPACE,
            claim_name=CLAIM,
            source=model.demo_model(),
            remote_name=model.FILE_NAME,
            image=operator.reference,
        )
        engine_loaded.result()
    with _step(4, "The operator: helm install octavo helm/octavo"):
        product.install(cluster, operator, engine)
    with _step(5, f"kubectl apply --filename {SAMPLE.relative_to(paths.PROJECT)}"):
        cluster.kubectl("apply", f"--filename={SAMPLE}", f"--namespace={NAMESPACE}")
        # Pods of an earlier demo would stay as they are: no upgrade replaces any by itself.
        update = f"{names.UPDATE_ANNOTATION}={engine.tag}"
        cluster.kubectl("annotate", f"ois/{SERVICE}", update, "--overwrite", f"--namespace={NAMESPACE}")
    with _step(6, "kubectl wait --for=condition=Ready"):
        _wait_until_ready(cluster)
    with _step(7, "An answer through the Service, by the openai client"), cluster.reach(NAMESPACE, SERVICE) as url:
        _stream_answer(f"{url}/v1")
    say(f"\nDone in {duration(time.monotonic() - begin)}. The cluster stays up.\n")
    sys.stdout.write(what_next(cluster))


def what_next(cluster: Cluster) -> str:
    """What to try once the demo has run."""
    scripts = paths.PROJECT / ".venv" / "bin"
    if cluster.name == "host":
        with cluster.reach(NAMESPACE, SERVICE) as url:
            address = f"URL={url}/v1"
    else:
        address = (
            f"kubectl port-forward --namespace {NAMESPACE} service/{SERVICE} 8080:80 &\n  URL=http://localhost:8080/v1"
        )
    return f"""\
Try next:
  export KUBECONFIG={cluster.kubeconfig} PATH={binaries.folder()}:{scripts}:$PATH
  kubectl get ois --namespace {NAMESPACE}
  kubectl describe ois {SERVICE} --namespace {NAMESPACE}
  kubectl octavo render --filename {SAMPLE.relative_to(paths.PROJECT)}
  {address}
  curl $URL/models
  curl --no-buffer $URL/chat/completions --header 'Content-Type: application/json' \\
    --data '{{"model": "{SERVICE}", "stream": true, "messages": [{{"role": "user", "content": "Say hello."}}]}}'
  OPENAI_BASE_URL=$URL OPENAI_API_KEY=none python -c 'import openai
  for chunk in openai.OpenAI().chat.completions.create(model="{SERVICE}", stream=True,
      messages=[{{"role": "user", "content": "Tell me about octopuses."}}]):
    print(chunk.choices[0].delta.content or "", end="", flush=True)'
  make run          # the same model on the terminal, without the cluster
Take it down:
  make demo-down    # leaves nothing but the cache in {paths.cache_dir()}
"""


@contextlib.contextmanager
def _step(number: int, title: str) -> Iterator[None]:
    say(f"\n[{number}/{STEPS}] {title}")
    begin = time.monotonic()
    yield
    say(f"    [{number}/{STEPS}] done in {duration(time.monotonic() - begin)}")


def _maker(cluster: Cluster) -> str:
    if cluster.name == "kind":
        return "kind, because Docker answers"
    return "this machine itself, because no Docker daemon answers"


def _wait_until_ready(cluster: Cluster) -> None:
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: Future[CompletedProcess[str]] = pool.submit(
            cluster.kubectl,
            "wait",
            "--for=condition=Ready",
            f"inferenceservice/{SERVICE}",
            f"--namespace={NAMESPACE}",
            f"--timeout={READY_SECONDS}s",
        )
        told = ""
        while not waiting.done():
            now = _ready_condition(cluster)
            if now and now != told:
                say(f"    {now}")
                told = now
            time.sleep(0.5)
        try:
            waiting.result()
        except CommandFailed as error:
            raise HarnessError(f"{SERVICE} is not Ready after {READY_SECONDS} s: {told}") from error


def _ready_condition(cluster: Cluster) -> str:
    condition = '.status.conditions[?(@.type=="Ready")]'
    template = f"--output=jsonpath={{{condition}.reason}}: {{{condition}.message}}"
    return cluster.kubectl(
        "get", "inferenceservice", SERVICE, f"--namespace={NAMESPACE}", template, check=False
    ).stdout.strip(": \n")


def _stream_answer(base_url: str) -> None:
    say(f"    base URL {base_url}, model {SERVICE}")
    say(f"    > {QUESTION}\n")
    # A proxy of this network's must not get what goes to the cluster.
    direct = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=base_url, api_key="none", http_client=direct, timeout=60, max_retries=0) as client:
        begin = time.monotonic()
        first: float | None = None
        usage = None
        stream = client.chat.completions.create(
            model=SERVICE,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=96,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                if choice.delta.content:
                    first = first or time.monotonic() - begin
                    sys.stdout.write(choice.delta.content)
                    sys.stdout.flush()
        elapsed = time.monotonic() - begin
    sys.stdout.write("\n\n")
    sys.stdout.flush()
    if usage is None or first is None:
        raise HarnessError("the stream ended without an answer")
    rate = usage.completion_tokens / elapsed
    say(f"    first token after {duration(first)}, {usage.completion_tokens} tokens, {rate:.0f} tokens/s")
