from octavo_engine.plan import SamplingParams
from octavo_engine.request import Request, RequestStatus

EOS = 2


def make_request(
    prompt: tuple[int, ...] = (10, 11, 12), *, stop: frozenset[int] = frozenset({EOS}), max_num_tokens: int = 6
) -> Request:
    return Request(
        request_id="a",
        arrival=0,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_num_tokens - len(prompt)),
        stop_token_ids=stop,
        max_num_tokens=max_num_tokens,
    )


def test_a_new_request_waits_with_its_whole_prompt_uncomputed() -> None:
    request = make_request()
    assert request.status is RequestStatus.WAITING
    assert (request.num_tokens, request.num_computed_tokens, request.num_uncomputed_tokens) == (3, 0, 3)
    assert request.block_ids == ()


def test_sampled_tokens_follow_the_prompt() -> None:
    request = make_request()
    assert request.append(20) is None
    assert request.append(21) is None
    assert request.token_ids == [10, 11, 12, 20, 21]
    assert request.prompt_token_ids == (10, 11, 12)


def test_a_stop_token_ends_the_request_and_is_part_of_its_output() -> None:
    request = make_request()
    assert request.append(20) is None
    assert request.append(EOS) == "stop"
    assert request.token_ids[-2:] == [20, EOS]


def test_a_stop_token_inside_the_prompt_ends_nothing() -> None:
    request = make_request(prompt=(EOS, EOS))
    assert request.append(20) is None


def test_the_last_allowed_token_ends_the_request_with_length() -> None:
    request = make_request(max_num_tokens=5)
    assert request.append(20) is None
    assert request.append(21) == "length"


def test_a_stop_token_in_the_last_allowed_place_counts_as_stop() -> None:
    request = make_request(max_num_tokens=4)
    assert request.append(EOS) == "stop"
