"""The link between two namespaces, as far as it needs no rights."""

from benchmarks.scenario import link_cases
from benchmarks.shaped_link import ROLES, ShapedLink


def test_the_use_of_a_link_is_a_part_of_what_it_can_carry():
    assert ShapedLink(1).use(125_000_000, 1) == 1
    assert ShapedLink(10).use(125_000_000, 2) == 0.05


def test_each_end_has_a_namespace_of_its_own():
    link = ShapedLink(1)
    prefixes = [link.prefix(role) for role in ROLES]
    assert all(prefix[:3] == ["ip", "netns", "exec"] for prefix in prefixes)
    assert len({prefix[3] for prefix in prefixes}) == 2


def test_both_engines_are_measured_in_every_case():
    for case in link_cases().values():
        assert len({contender.engine for contender in case.contenders}) == 2
