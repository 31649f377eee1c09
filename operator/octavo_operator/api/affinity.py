"""On which nodes, and beside which pods of the namespace, the pods run: spec.pod.affinity. Used by pod.py only.

Names and meanings are those of core/v1 Affinity; typed and bounded, because its whole schema would fill half of the
CRD. Left out are the fields that reach into other namespaces, conditions on pods' labels other than equality, and nodes
by their fields.
"""

from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import Field

from octavo_operator.api.base import VALID_KEYS, LabelKey, LabelValue, ListOf, Model, Rule

T = TypeVar("T")
Few = Annotated[ListOf[T], Field(min_length=1, max_length=8, json_schema_extra={"x-kubernetes-list-type": "atomic"})]
Weight = Annotated[int, Field(ge=1, le=100)]


class NodeRequirement(Model):
    """A condition on one label of a node."""

    rules: ClassVar = (
        Rule(
            cel="self.operator in ['Exists', 'DoesNotExist'] ? !has(self.values) || size(self.values) == 0 : "
            "has(self.values) && size(self.values) > 0",
            holds=lambda it: (it.operator in {"Exists", "DoesNotExist"}) != bool(it.values),
            message="operator In, NotIn, Gt and Lt need values, Exists and DoesNotExist take none",
        ),
        Rule(
            cel="!(self.operator in ['Gt', 'Lt']) || !has(self.values) || "
            "size(self.values) == 1 && self.values[0].matches('^-?[0-9]+$')",
            holds=lambda it: (
                it.operator not in {"Gt", "Lt"}
                or not it.values
                or (len(it.values) == 1 and it.values[0].removeprefix("-").isdecimal())
            ),
            message="operator Gt and Lt compare with one whole number",
        ),
    )

    key: Annotated[LabelKey, Field(min_length=1)] = Field(description="The label's key.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field(
        description="How the label relates to the values."
    )
    values: Annotated[ListOf[LabelValue], Field(max_length=16)] | None = Field(default=None, description="The values.")


class NodeTerm(Model):
    """Conditions on a node's labels, all of which must hold."""

    match_expressions: Few[NodeRequirement] = Field(description="The conditions.")


class NodeTerms(Model):
    """Nodes, by their labels."""

    node_selector_terms: Few[NodeTerm] = Field(description="A node for which one of these holds will do.")


class PreferredNodes(Model):
    """Nodes that are better than others."""

    weight: Weight = Field(description="How much better, 1 to 100.")
    preference: NodeTerm = Field(description="Which.")


class NodeAffinity(Model):
    """On which nodes."""

    required_during_scheduling_ignored_during_execution: NodeTerms | None = Field(
        default=None, description="On these only."
    )
    preferred_during_scheduling_ignored_during_execution: Few[PreferredNodes] | None = Field(
        default=None, description="Rather on these."
    )


class PodSelector(Model):
    """Pods, by their labels."""

    match_labels: Annotated[dict[str, LabelValue], Field(min_length=1, max_length=8), VALID_KEYS] = Field(
        description="Labels that a pod must have."
    )


class PodTerm(Model):
    """Where pods of this namespace run."""

    label_selector: PodSelector = Field(description="Which pods.")
    topology_key: Annotated[LabelKey, Field(min_length=1)] = Field(
        description="The label of nodes that says what one place is, such as kubernetes.io/hostname."
    )


class PreferredPods(Model):
    """Places that are better than others."""

    weight: Weight = Field(description="How much better, 1 to 100.")
    pod_affinity_term: PodTerm = Field(description="Which.")


class PodAffinity(Model):
    """Beside which pods, or away from which."""

    required_during_scheduling_ignored_during_execution: Few[PodTerm] | None = Field(
        default=None, description="All of these must hold."
    )
    preferred_during_scheduling_ignored_during_execution: Few[PreferredPods] | None = Field(
        default=None, description="Rather so."
    )


class Affinity(Model):
    """Where the pods run."""

    node_affinity: NodeAffinity | None = Field(default=None, description="On which nodes.")
    pod_affinity: PodAffinity | None = Field(default=None, description="In one place with which pods.")
    pod_anti_affinity: PodAffinity | None = Field(default=None, description="In no place with which pods.")
