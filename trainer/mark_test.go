package trainer

import (
	"crypto/sha256"
	"encoding/hex"
	"math/rand/v2"
	"testing"
)

// A mark is that of its body and of no body that differs anywhere; each is drawn anew.
func TestMarks(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for _, n := range []int{0, 1, 15, 16, 17, 128, 1000, 70001} {
		body := make([]byte, n)
		for i := range body {
			body[i] = byte(r.Uint32())
		}
		sum := sha256.Sum256(body)
		mark, old := markOf(body), hex.EncodeToString(sum[:])
		if again := markOf(body); again == mark || len(mark) != len(old) {
			t.Fatalf("marks %s and %s of one body", mark, again)
		}
		for _, m := range []string{mark, old} {
			if !marks(m, body) {
				t.Fatalf("%d bytes: %s is not the mark of its body", n, m)
			}
			if marks(m, append([]byte{0}, body...)) || marks(m, append(body[:n:n], 0)) {
				t.Fatalf("%d bytes: %s is the mark of a longer body", n, m)
			}
			for range min(n, 50) {
				at, bit := r.IntN(n), byte(1<<r.IntN(8))
				body[at] ^= bit
				if marks(m, body) {
					t.Fatalf("%d bytes: %s is the mark of a body that differs at %d", n, m, at)
				}
				body[at] ^= bit
			}
		}
	}
	for _, m := range []string{"", "0a", "no hex", hex.EncodeToString(make([]byte, 33))} {
		if marks(m, nil) {
			t.Fatalf("%q is a mark", m)
		}
	}
}
