"""How the number of replicas follows the load: spec.autoscaling. Used by v1alpha1.py.

`behavior` has the names and meanings of autoscaling/v2 HorizontalPodAutoscalerBehavior.
"""

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from octavo_operator.api.base import ListOf, Model, Rule, matches

DEFAULT_TARGETS: Final = {"cpu": "80", "queue": "4", "kvCache": "80"}
LARGEST_TARGETS: Final = {"cpu": 999, "kvCache": 100}


class ScalingPolicy(Model):
    """How much may change in a while."""

    type: Literal["Pods", "Percent"] = Field(description="What value counts.")
    value: Annotated[int, Field(ge=1, le=1000)] = Field(description="Pods, or percent of the pods that there are.")
    period_seconds: Annotated[int, Field(ge=1, le=1800)] = Field(description="In how long.")


class ScalingRules(Model):
    """How fast the number changes in one direction."""

    stabilization_window_seconds: Annotated[int, Field(ge=0, le=3600)] | None = Field(
        default=None,
        description="Of all that was wanted within so long, the most cautious counts. Default: 0 up, 300 down.",
    )
    select_policy: Literal["Max", "Min", "Disabled"] | None = Field(
        default=None, description="Which of several policies counts; Disabled: never in this direction. Default: Max."
    )
    policies: (
        Annotated[
            ListOf[ScalingPolicy],
            Field(min_length=1, max_length=4, json_schema_extra={"x-kubernetes-list-type": "atomic"}),
        ]
        | None
    ) = Field(default=None, description="How much may change. Default: Kubernetes' up; one pod a minute down.")


class ScalingBehavior(Model):
    """How fast the number of replicas changes."""

    scale_up: ScalingRules | None = Field(default=None, description="When there is more to do.")
    scale_down: ScalingRules | None = Field(default=None, description="When there is less to do.")


class AutoscalingSpec(Model):
    """How the number of replicas follows the load."""

    rules: ClassVar = (
        Rule(
            cel="self.minReplicas <= self.maxReplicas",
            holds=lambda it: it.min_replicas <= it.max_replicas,
            message="minReplicas must not be greater than maxReplicas",
        ),
        Rule(
            cel="self.metric != 'tokens' || has(self.target)",
            holds=lambda it: it.metric != "tokens" or it.target is not None,
            message="metric tokens needs target: how many tokens a second one pod may generate before another comes",
        ),
        Rule(
            cel="!has(self.target) || !(self.metric in ['cpu', 'kvCache']) || "
            "size(self.target) <= 3 && (self.metric == 'cpu' || size(self.target) < 3 || self.target == '100')",
            holds=lambda it: it.target is None or int(it.target) <= LARGEST_TARGETS.get(it.metric, 999_999),
            message="target is a percentage: at most 999 for metric cpu, and 100 for kvCache",
        ),
    )

    min_replicas: int = Field(default=1, ge=1, le=1000, description="Never fewer replicas than this.")
    max_replicas: int = Field(ge=1, le=1000, description="Never more replicas than this.")
    metric: Literal["cpu", "queue", "kvCache", "tokens"] = Field(
        default="cpu",
        description="What is measured. cpu: use of CPU in percent of the CPU that the pods request, which takes "
        "metrics-server. queue: requests that wait. kvCache: use of the KV cache in percent. tokens: tokens generated "
        "a second. The last three take Prometheus, with KEDA or prometheus-adapter.",
    )
    target: (
        Annotated[
            str,
            Field(max_length=6),
            matches("[1-9][0-9]{0,5}", 'must be a whole number from 1 to 999999 in quotes, such as "80"'),
        ]
        | None
    ) = Field(
        default=None,
        description="The average over all pods at which the metric is held. Default: 80 percent for cpu and kvCache, 4 "
        "requests for queue; tokens has none.",
    )
    behavior: ScalingBehavior | None = Field(default=None, description="How fast the number of replicas changes.")

    @property
    def wanted(self) -> str:
        """The target, also where the spec gives none."""
        return self.target or DEFAULT_TARGETS[self.metric]
