package access

import (
	"math/rand/v2"
	"testing"
)

// TestShares takes and gives places at random beside a plain count.
func TestShares(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 1))
	const most, each = 7, 3
	s := newShares(most, each)
	held := map[string]int{}
	total := 0
	for range 10_000 {
		token := []string{"a", "b", "c", ""}[rng.IntN(4)] // "" without tokens: only the total counts
		if held[token] > 0 && rng.IntN(2) == 0 {
			s.give(token)
			held[token]--
			total--
			continue
		}
		want := total < most && (token == "" || held[token] < each)
		why, err := s.take(token)
		if (err == nil) != want || (why == "") != want {
			t.Fatalf("seed %d: %q took with %v held: %q, %v", seed, token, held, why, err)
		}
		if err == nil {
			held[token]++
			total++
		}
	}
	for token, n := range held {
		for range n {
			s.give(token)
		}
	}
	if s.total != 0 || len(s.of) != 0 {
		t.Errorf("seed %d: %d held, %v", seed, s.total, s.of)
	}
	free := newShares(0, 0)
	for range 1000 {
		if _, err := free.take("a"); err != nil {
			t.Fatal(err)
		}
	}
}
