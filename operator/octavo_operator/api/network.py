"""Who may reach a service: the peers of spec.endpoint.allowFrom, as a NetworkPolicy names them.

Used by v1alpha1.py only. Names and meanings are those of networking.k8s.io/v1 NetworkPolicyPeer; typed and bounded.
"""

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from octavo_operator.api.base import VALID_KEYS, LabelKey, LabelValue, ListOf, Model, Rule, matches

_OCTET: Final = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4_BLOCK: Final = rf"(?:{_OCTET}[.]){{3}}{_OCTET}/(?:3[0-2]|[12]?[0-9])"
_IPV6_BLOCK: Final = "[0-9a-fA-F:]*:[0-9a-fA-F:]*/(?:12[0-8]|1[01][0-9]|[1-9]?[0-9])"


class LabelRequirement(Model):
    """A condition on one label."""

    rules: ClassVar = (
        Rule(
            cel="self.operator in ['Exists', 'DoesNotExist'] ? !has(self.values) || size(self.values) == 0 : "
            "has(self.values) && size(self.values) > 0",
            holds=lambda it: (it.operator in {"Exists", "DoesNotExist"}) != bool(it.values),
            message="operator In and NotIn need values, Exists and DoesNotExist take none",
        ),
    )

    key: Annotated[LabelKey, Field(min_length=1)] = Field(description="The label's key.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"] = Field(
        description="How the label relates to the values."
    )
    values: Annotated[ListOf[LabelValue], Field(max_length=16)] | None = Field(
        default=None, description="The values, for In and NotIn."
    )


class LabelSelector(Model):
    """Selects objects by their labels; an empty one selects all."""

    match_labels: Annotated[dict[str, LabelValue], Field(max_length=16), VALID_KEYS] | None = Field(
        default=None, description="Labels that an object must have."
    )
    match_expressions: (
        Annotated[ListOf[LabelRequirement], Field(max_length=8, json_schema_extra={"x-kubernetes-list-type": "atomic"})]
        | None
    ) = Field(default=None, description="Conditions on labels, all of which must hold.")


class IPBlock(Model):
    """A range of addresses."""

    cidr: Annotated[
        str,
        Field(max_length=64),
        matches(f"{_IPV4_BLOCK}|{_IPV6_BLOCK}", "must be a range of addresses such as 10.0.0.0/8 or 2001:db8::/64"),
    ] = Field(description="The range, such as 10.0.0.0/8 or 2001:db8::/64.")


class Peer(Model):
    """Pods, namespaces or addresses that may reach the service."""

    rules: ClassVar = (
        Rule(
            cel="has(self.ipBlock) != (has(self.podSelector) || has(self.namespaceSelector))",
            holds=lambda it: (it.ip_block is None) != (it.pod_selector is None and it.namespace_selector is None),
            message="must have either ipBlock or podSelector, namespaceSelector or both; {} selects all",
        ),
    )

    pod_selector: LabelSelector | None = Field(
        default=None, description="These pods: of the selected namespaces, or of this one. {} selects all."
    )
    namespace_selector: LabelSelector | None = Field(
        default=None, description="The pods of these namespaces. {} selects all."
    )
    ip_block: IPBlock | None = Field(
        default=None, description="Addresses that are no pods', such as those of a load balancer or of nodes."
    )
