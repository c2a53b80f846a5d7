"""Guesses for free decoding: what followed the last tokens of a text elsewhere, in itself and in texts like it.

A draft repeats its previous visit, the gold answer, the prompt and itself. The guess is what followed the longest
suffix of the text that occurs before: in the corpora or in the text. A suffix automaton finds it in constant amortised
time a token, whatever the length of the match (Blumer et al. 1985; for speculative decoding Hu et al. 2024,
arXiv 2411.10666), so there is no n-gram size to choose but the least.
"""

from __future__ import annotations

from collections.abc import Sequence

SHORTEST = 2  # tokens; one token alone (a comma, "the") says too little about the next


class Lookup:
    """Looks up the end of a growing text in itself and in `corpora`.

    Args:
        corpora: token lists in order of preference. Of equally long matches the first wins, the text's own last.
        tokens: the text so far, usually a prompt; it is searched, too.
    """

    def __init__(self, corpora: Sequence[Sequence[int]], tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []  # corpora and text one after the other, a separator (below 0) after each corpus
        self._next: list[dict[int, int]] = [{}]  # a state is a set of substrings that end at the same places
        self._link = [-1]  # the state of the longest suffix that also ends elsewhere
        self._length = [0]  # of a state's longest substring
        self._follower = [0]  # index of the token after a state's first occurrence
        self._state = 0  # of all of `_tokens`
        for number, corpus in enumerate(corpora):
            for token in corpus:
                self.append(token)
            self.append(-1 - number)
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add a token that has become final to the text."""
        self._tokens.append(token)
        new = self._add_state({}, self._length[self._state] + 1, len(self._tokens))
        state = self._state
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        if state >= 0:
            self._link[new] = self._split(state, token)
        else:
            self._link[new] = 0
        self._state = new

    def propose(self, count: int) -> list[int]:
        """Up to `count` tokens that followed the longest match; [] without a match that something follows.

        A match in the text itself goes on into the proposal: what repeats is proposed as often as it fits.
        """
        state = self._link[self._state]
        while state > 0 and self._length[state] >= SHORTEST:
            begin = self._follower[state]
            if self._tokens[begin] >= 0:  # else the match is the end of a corpus: a shorter one may be elsewhere
                return self._copy(begin, count)
            state = self._link[state]
        return []

    def _copy(self, begin: int, count: int) -> list[int]:
        period = len(self._tokens) - begin
        copied: list[int] = []
        for i in range(count):
            token = self._tokens[begin + i] if i < period else copied[i - period]
            if token < 0:
                break
            copied.append(token)
        return copied

    def _split(self, state: int, token: int) -> int:
        """The state that a suffix link over `token` leads to; split off where longer substrings end elsewhere."""
        target = self._next[state][token]
        if self._length[target] == self._length[state] + 1:
            return target
        clone = self._add_state(dict(self._next[target]), self._length[state] + 1, self._follower[target])
        self._link[clone] = self._link[target]
        self._link[target] = clone
        while state >= 0 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _add_state(self, transitions: dict[int, int], length: int, follower: int) -> int:
        self._next.append(transitions)
        self._link.append(-1)
        self._length.append(length)
        self._follower.append(follower)
        return len(self._link) - 1
