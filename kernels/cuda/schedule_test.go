package cuda

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"trainerd/kernels"
)

var updateSchedules = flag.Bool("update-schedules", false, "write emu/testdata/schedules.txt anew")

// grouped lays out prompts with their completions, one group after the other.
func grouped(groups [][]int32) (segments []kernels.Segment, t int32) {
	for _, g := range groups {
		prompt := t
		for i, n := range g {
			s := kernels.Segment{Q: t, QLen: n, K: t, KLen: n}
			if i > 0 {
				s.Prefix, s.PrefixLen = prompt, g[0]
			}
			segments = append(segments, s)
			t += n
		}
	}
	return segments, t
}

// pair is a query row and a key row: an own key or one of the prefix.
type pair struct {
	q, key int32
	own    bool
}

// pairsOf lists what the contract of kernels.Segment says is seen.
func pairsOf(segments []kernels.Segment) map[pair]int {
	out := map[pair]int{}
	for _, s := range segments {
		for i := range s.QLen {
			for j := range s.PrefixLen {
				out[pair{s.Q + i, s.Prefix + j, false}]++
			}
			for j := range s.KLen {
				if j <= i+s.KLen-s.QLen {
					out[pair{s.Q + i, s.K + j, true}]++
				}
			}
		}
	}
	return out
}

// forwardPairs lists what the items make the forward kernels attend to.
func forwardPairs(s *Schedule) map[pair]int {
	out := map[pair]int{}
	for ; len(s.Items) > 0; s.Items = s.Items[12:] {
		x := s.Items
		for i := range x[1] {
			for c := x[6]; c < min(x[7], x[5]+max(0, x[3]+i)); c++ {
				if c < x[5] {
					out[pair{x[0] + i, x[4] + c, false}]++
				} else {
					out[pair{x[0] + i, x[2] + c - x[5], true}]++
				}
			}
		}
	}
	return out
}

// backwardPairs lists what the works make the dK/dV kernels go over.
func backwardPairs(s *Schedule) map[pair]int {
	out := map[pair]int{}
	for w := s.Works; len(w) > 0; w = w[8:] {
		for _, r := range chunksOf(s.Ranges, 4)[w[2] : w[2]+w[3]] {
			for _, t := range chunksOf(s.Tiles, 8)[r[0] : r[0]+r[1]] {
				for i := range t[1] {
					for j := range w[1] {
						if r[2] == 0 || j < t[3]+i+t[2]-w[0] {
							out[pair{t[0] + i, w[0] + j, r[2] == 1}]++
						}
					}
				}
			}
		}
	}
	return out
}

func chunksOf(x []int32, n int) (out [][]int32) {
	for ; len(x) > 0; x = x[n:] {
		out = append(out, x[:n])
	}
	return out
}

func comparePairs(t *testing.T, what string, got, want map[pair]int) {
	t.Helper()
	for p, n := range want {
		if got[p] != n {
			t.Fatalf("%s: query %d and key %d (own %v) are paired %d times, expected %d", what, p.q, p.key, p.own, got[p], n)
		}
	}
	if len(got) != len(want) {
		t.Fatalf("%s: %d pairs, expected %d", what, len(got), len(want))
	}
}

// Every pair of query and key that a segment allows is visited once, by both passes.
func TestScheduleVisitsEveryPairOnce(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for range 60 {
		var groups [][]int32
		for range 1 + rng.IntN(3) {
			g := []int32{rng.Int32N(200)}
			for range rng.IntN(5) {
				g = append(g, rng.Int32N(60))
			}
			groups = append(groups, g)
		}
		segments, _ := grouped(groups)
		rng.Shuffle(len(segments), func(i, j int) { segments[i], segments[j] = segments[j], segments[i] })
		kv := 1 + rng.IntN(4)
		h := kv * []int{1, 2, 3, 7, 16, 64}[rng.IntN(6)]
		s := NewSchedule(segments, h, kv, true)
		if s.Slots > MaxSlots || s.PartRows > MaxPartRows(kv) {
			t.Fatalf("%d slots, %d partial rows", s.Slots, s.PartRows)
		}
		for _, x := range chunksOf(s.Tiles, 8) {
			if int(x[1])*(h/kv) > tileRows || x[1] < 1 {
				t.Fatalf("tile of %d tokens, %d heads each", x[1], h/kv)
			}
		}
		want := pairsOf(segments)
		comparePairs(t, "backward", backwardPairs(s), want)
		comparePairs(t, "forward", forwardPairs(s), want)
	}
}

// Pieces of one key block have slots of their own, in order, and all other blocks none.
func TestScheduleSplits(t *testing.T) {
	segments, _ := grouped([][]int32{{300, 200, 200, 200, 200, 200, 200}, {64, 900}})
	s := NewSchedule(segments, 28, 4, true)
	if s.Slots == 0 || s.Slots > MaxSlots {
		t.Fatalf("%d slots, expected 1 to %d", s.Slots, MaxSlots)
	}
	owner := make([]int, s.Slots)
	for _, x := range chunksOf(s.Splits, 4) {
		for p := range x[3] {
			owner[x[2]+p]++
			n := 0
			for _, w := range chunksOf(s.Works, 8) {
				if w[4] == x[2]+p && w[0] == x[0] && w[1] == x[1] {
					n++
				}
			}
			if n != 1 {
				t.Errorf("slot %d of keys %d has %d works, expected 1", x[2]+p, x[0], n)
			}
		}
	}
	for i, n := range owner {
		if n != 1 {
			t.Errorf("slot %d belongs to %d splits, expected 1", i, n)
		}
	}
}

// How a sequence's keys are cut in decoding does not depend on its neighbours.
func TestScheduleOfDecodingDoesNotDependOnNeighbours(t *testing.T) {
	segment := func(i int32) kernels.Segment {
		return kernels.Segment{Q: i, QLen: 1, K: 5000 + 600*i, KLen: 500, Prefix: 0, PrefixLen: 2000}
	}
	one := NewSchedule([]kernels.Segment{segment(0)}, 14, 2, false)
	var all []kernels.Segment
	for i := range int32(64) {
		all = append(all, segment(i))
	}
	many := NewSchedule(all, 14, 2, false)
	if len(one.Items)/12 != 10 || len(many.Items)/12 != 640 {
		t.Errorf("%d items for one sequence and %d for 64, expected 10 and 640", len(one.Items)/12, len(many.Items)/12)
	}
	for i, x := range chunksOf(many.Combines, 4) {
		if x[0] != int32(i) || x[3] != 10 || x[2] != int32(i)*70 {
			t.Errorf("sequence %d is combined as %v", i, x)
		}
	}
}

// emuCases are the attention problems that the emulator runs; see emu/test_attention.cc.
func emuCases() []struct {
	h, kv, hd int
	segments  []kernels.Segment
	backward  bool
} {
	train := func(groups ...[]int32) []kernels.Segment { s, _ := grouped(groups); return s }
	var decode []kernels.Segment
	for i := range int32(3) {
		decode = append(decode, kernels.Segment{Q: i, QLen: 1, K: 1000 + 12*i, KLen: 11 - i, Prefix: 300 * (i / 2), PrefixLen: 640 - 100*i})
	}
	prefill := []kernels.Segment{
		{Q: 0, QLen: 20, K: 3, KLen: 90},
		{Q: 20, QLen: 4, K: 200, KLen: 12, Prefix: 100, PrefixLen: 25},
		{Q: 24, QLen: 3, K: 220, KLen: 1, Prefix: 130, PrefixLen: 5}, // the first two queries see no own key
		{Q: 27, QLen: 2, K: 230, KLen: 1},                            // the first sees nothing at all
	}
	return []struct {
		h, kv, hd int
		segments  []kernels.Segment
		backward  bool
	}{
		{1, 1, 64, train([]int32{1}), true},
		{3, 1, 64, train([]int32{5, 1, 2}, []int32{0, 3}, []int32{4, 0, 7}), true},
		{7, 1, 64, train([]int32{40, 29, 8}), true},
		{6, 2, 64, train([]int32{70, 13, 1, 31}, []int32{1, 1}), true},
		{2, 1, 128, train([]int32{100, 57, 3}), true},
		{2, 2, 128, train([]int32{130}), true},
		{32, 1, 64, train([]int32{30, 20, 20}), true},
		{14, 2, 64, decode, false},
		{2, 1, 128, decode, false},
		{4, 2, 64, prefill, false},
		{3, 3, 10, prefill, false},
		{3, 1, 6, train([]int32{5, 1, 2}, []int32{0, 3}, []int32{4, 0, 7}), true},
		{2, 2, 96, train([]int32{40, 9}), true},
		{64, 2, 32, train([]int32{40, 9, 6}), true},
		{2, 1, 256, train([]int32{12, 9}), true},
	}
}

// The emulator reads the schedules that this package makes.
func TestEmulatorSchedules(t *testing.T) {
	var b bytes.Buffer
	for _, c := range emuCases() {
		s := NewSchedule(c.segments, c.h, c.kv, c.backward)
		backward := 0
		if c.backward {
			backward = 1
		}
		fmt.Fprintf(&b, "case %d %d %d %d %d %d\n", c.h, c.kv, c.hd, backward, s.PartRows, s.Slots)
		var flat []int32
		for _, g := range c.segments {
			flat = append(flat, g.Q, g.QLen, g.K, g.KLen, g.Prefix, g.PrefixLen)
		}
		for _, x := range [][]int32{flat, s.Tiles, s.Items, s.Combines, s.Order, s.Works, s.Ranges, s.Splits} {
			fmt.Fprintf(&b, "%d", len(x))
			for _, v := range x {
				fmt.Fprintf(&b, " %d", v)
			}
			fmt.Fprintln(&b)
		}
	}
	path := filepath.Join("emu", "testdata", "schedules.txt")
	if *updateSchedules {
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, b.Bytes()) {
		t.Error("emu/testdata/schedules.txt is stale: go test ./kernels/cuda -run EmulatorSchedules -update-schedules")
	}
}
