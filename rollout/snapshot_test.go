package rollout

import (
	"bytes"
	"errors"
	flags "flag"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/internal/checked"
)

// The snapshots of these tests are files of their own.
const snapshotMagic = "snapshot"

func encoded(t testing.TB, s *Snapshot) []byte {
	t.Helper()
	var out bytes.Buffer
	w := checked.NewWriter(&out, snapshotMagic, 1)
	s.Put(w)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func decoded(raw []byte) (*Snapshot, error) {
	d, _, err := checked.NewReader(bytes.NewReader(raw), snapshotMagic, 1)
	if err != nil {
		return nil, err
	}
	s := TakeSnapshot(d)
	return s, d.Close()
}

// restored is an assembler made of the bytes of a's snapshot.
func restored(t *testing.T, a *Assembler) *Assembler {
	t.Helper()
	s, err := decoded(encoded(t, a.Snapshot()))
	if err != nil {
		t.Fatal(err)
	}
	b, err := RestoreAssembler(a.opts, s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A random life goes on alike from a snapshot, taken at a random moment and
// encoded only after the assembler had gone on.
func TestALifeGoesOnFromASnapshot(t *testing.T) {
	r := seeded(t)
	for range 20 {
		opts := AssemblerOptions{GroupSize: 1 + r.IntN(4), MaxPolicyLag: int64(r.IntN(4)) - 1, GroupTimeout: time.Duration(r.IntN(20)),
			Incomplete: []string{IncompleteDrop, IncompleteTrain}[r.IntN(2)]}
		all := []*Assembler{NewAssembler(opts)}
		var pending *Snapshot
		var encodedThen []byte
		step, now := int64(0), time.Unix(100, 0).UTC()
		for seq := uint64(1); seq < 120; seq++ {
			now = now.Add(time.Duration(r.IntN(3)))
			b := Batch{Received: now, Components: [][]string{nil, {"x"}, {"x", "y"}}[r.IntN(3)]}
			for range 1 + r.IntN(4) {
				x := at(row(fmt.Sprint([]string{"a", "b", "c"}[r.IntN(3)], r.IntN(40)), r.Int32N(3), r.Int32N(3)), max(step-int64(r.IntN(3)), NoPolicyStep))
				x.Reward, x.Truncated = r.Float64(), r.IntN(2) == 0
				if r.IntN(2) == 0 {
					x.ID = fmt.Sprint("id", r.IntN(60))
				}
				if b.Components != nil {
					x.Components = make([]float64, len(b.Components))
					for i := range x.Components {
						x.Components[i] = r.Float64()
					}
				}
				if r.IntN(2) == 0 {
					x.SamplerLogProbs, x.LossMask, x.LossWeights = []float32{-1, r.Float32()}, []bool{true, r.IntN(2) == 0}, []float32{1, r.Float32()}
				}
				b.Rollouts = append(b.Rollouts, x)
			}
			do := r.IntN(6)
			n := 1 + r.IntN(3)
			var said []string
			for _, a := range all {
				mine := b
				mine.Rollouts = slices.Clone(b.Rollouts)
				res, err := a.Add(seq, &mine)
				what := fmt.Sprint(res, err)
				switch do {
				case 0:
					what += fmt.Sprint(a.Expire(now))
				case 1, 2:
					taken, stale := a.Take(n, step)
					what += fmt.Sprintf("%+v %+v", taken, stale)
					if err := a.Mark(ids(taken), State{Status: Trained, Step: step + 1}); err != nil {
						t.Fatal(err)
					}
				}
				said = append(said, what)
			}
			if do == 1 {
				step++
			}
			for i, a := range all {
				if said[i] != said[0] {
					t.Fatalf("%d restores ago it answered\n%s\nnow\n%s", i, said[0], said[i])
				}
				if seq%20 != 0 {
					continue
				}
				if diff := cmp.Diff(fmt.Sprintf("%+v", dump(all[0])), fmt.Sprintf("%+v", dump(a))); diff != "" {
					t.Fatal(diff)
				}
			}
			switch {
			case pending != nil:
				if !bytes.Equal(encoded(t, pending), encodedThen) {
					t.Fatal("a snapshot changed with its assembler")
				}
				pending = nil
			case seq%20 == 10:
				pending = all[0].Snapshot()
				encodedThen = encoded(t, pending)
			case seq%20 == 15 && len(all) < 5:
				all = append(all, restored(t, all[len(all)-1]))
			}
		}
	}
}

// What is taken counts as ready, at its old place.
func TestASnapshotPutsTakenGroupsBack(t *testing.T) {
	a := NewAssembler(AssemblerOptions{GroupSize: 1, MaxPolicyLag: -1})
	mustAdd(t, a, 1, row("a", 1), row("b", 2), row("c", 3))
	taken, _ := a.Take(2, 0)
	b := restored(t, a)
	if a.Ready() != 1 || b.Ready() != 3 || a.Group("a").State.Status != Taken {
		t.Fatal(a.Ready(), b.Ready(), a.Group("a"))
	}
	a.Requeue(taken)
	if diff := cmp.Diff(fmt.Sprintf("%+v", dump(a)), fmt.Sprintf("%+v", dump(b))); diff != "" {
		t.Fatal(diff)
	}
}

func TestASnapshotHasEveryCounter(t *testing.T) {
	a := NewAssembler(AssemblerOptions{GroupSize: 1})
	v := reflect.ValueOf(&a.counters).Elem()
	for i := range v.NumField() {
		if f := v.Field(i); f.Kind() == reflect.Map {
			f.Set(reflect.ValueOf(map[string]int64{"reason": int64(i)}))
		} else {
			f.SetInt(int64(i + 100))
		}
	}
	if diff := cmp.Diff(a.Counters(), restored(t, a).Counters()); diff != "" {
		t.Fatal(diff)
	}
}

// full is an assembler with something of everything.
func full(t testing.TB) *Assembler {
	a := NewAssembler(AssemblerOptions{GroupSize: 2, MaxPolicyLag: 1, GroupTimeout: time.Minute})
	rich := func(g, id string) Rollout {
		r := named(row(g, 7, 8), id)
		r.Components, r.SamplerLogProbs, r.LossMask, r.LossWeights = []float64{0.5, -1}, []float32{-0.25, -2}, []bool{true, false}, []float32{1, 0.5}
		r.Reward, r.PolicyStep, r.Truncated = -0.5, 3, true
		return r
	}
	b := &Batch{Components: []string{"format", "task"}, Received: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
		Rollouts: []Rollout{rich("a1", "r1"), rich("b1", "r2"), rich("a1", "r3"), rich("c1", "r4"), rich("c1", "r5"), rich("b2", "")}}
	for _, err := range []error{
		second(a.Add(3, b)),
		second(a.Add(5, batch(row("b3", 1), row("b3", 2), at(row("c4", 1), 0), at(row("c4", 2), 1)))),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	taken, _ := a.Take(1, 3)
	if err := errors.Join(a.Mark(ids(taken), State{Status: Trained, Step: 4}), a.Mark([]string{"c4"}, State{Status: Dropped, Reason: "policy_lag"})); err != nil {
		t.Fatal(err)
	}
	return a
}

func second(_ AddResult, err error) error { return err }

var update = flags.Bool("update", false, "write testdata of a format that is not published yet")

// testdata/v1 is read for ever.
func TestFrozenSnapshot(t *testing.T) {
	path := filepath.Join("testdata", "v1", "queue.bin")
	a := full(t)
	if *update {
		if err := os.WriteFile(path, encoded(t, a.Snapshot()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := decoded(raw)
	if err != nil {
		t.Fatal(err)
	}
	b, err := RestoreAssembler(a.opts, s)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(fmt.Sprintf("%+v", dump(a)), fmt.Sprintf("%+v", dump(b))); diff != "" {
		t.Fatal(diff)
	}
}

// Every byte counts: one that is changed, missing or too many is noticed.
func TestADamagedSnapshotIsRefused(t *testing.T) {
	raw := encoded(t, full(t).Snapshot())
	for i := range raw {
		bad := slices.Clone(raw)
		bad[i] ^= 0x41
		if _, err := decoded(bad); !errors.Is(err, checked.ErrDamaged) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
		if _, err := decoded(raw[:i]); !errors.Is(err, checked.ErrDamaged) {
			t.Fatalf("cut at %d: %v", i, err)
		}
	}
	if _, err := decoded(append(slices.Clone(raw), 0)); !errors.Is(err, checked.ErrDamaged) {
		t.Fatalf("a byte more: %v", err)
	}
}

// Bytes that pass the checksum and make no sense are refused, and those that make
// sense are a state that can be written again.
func FuzzSnapshot(f *testing.F) {
	a := full(f)
	raw := encoded(f, a.Snapshot())
	f.Add(raw[:len(raw)-4])
	f.Add([]byte(snapshotMagic))
	f.Fuzz(func(t *testing.T, body []byte) {
		sum := crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli))
		whole := append(slices.Clone(body), byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24))
		s, err := decoded(whole)
		if err != nil {
			return
		}
		b, err := RestoreAssembler(a.opts, s)
		if err != nil {
			return
		}
		c := restored(t, b)
		if diff := cmp.Diff(fmt.Sprintf("%+v", dump(b)), fmt.Sprintf("%+v", dump(c))); diff != "" {
			t.Fatal(diff)
		}
		b.Expire(time.Unix(1<<40, 0))
		b.Take(1, 1<<40)
		if err := b.Mark(b.Live(), State{Status: Dropped, Reason: "end"}); err != nil {
			t.Fatal(err)
		}
	})
}

// What closing costs: see docs/reliability.md.
func TestBytesOfASnapshot(t *testing.T) {
	const groups = 1000
	for _, c := range []struct {
		ids       bool
		per, most int // bytes of a closed group of 8 rows
	}{{false, 0, 80}, {true, 0, 80 + 8*32}} {
		a := NewAssembler(AssemblerOptions{GroupSize: 8, MaxPolicyLag: -1})
		for i := range groups {
			var rows []Rollout
			for k := range 8 {
				x := row(fmt.Sprintf("a-%032d", i), int32(k))
				if c.ids {
					x.ID = fmt.Sprintf("%d-%d", i, k)
				}
				rows = append(rows, x)
			}
			mustAdd(t, a, uint64(i+1), rows...)
			taken, _ := a.Take(1, 0)
			if err := a.Mark(ids(taken), State{Status: Trained, Step: int64(i + 1)}); err != nil {
				t.Fatal(err)
			}
		}
		n := len(encoded(t, a.Snapshot()))
		t.Logf("rollout ids %v: %d bytes for each closed group of 8 rows", c.ids, n/groups)
		if n > groups*(c.most+16) {
			t.Errorf("rollout ids %v: %d bytes for %d closed groups", c.ids, n, groups)
		}
	}
}

// A group that was counted as stale when it was taken is counted once, however
// often it goes back.
func TestStaleGroupsGoBackWithTheirCount(t *testing.T) {
	a := NewAssembler(AssemblerOptions{GroupSize: 1, MaxPolicyLag: 1, Stale: StaleAdmit})
	mustAdd(t, a, 1, at(row("a", 1), 0), at(row("b", 1), 5))
	for range 2 {
		taken, _ := a.Take(2, 5)
		if n := a.Counters().StaleAdmitted; n != 1 || len(taken) != 2 {
			t.Fatal(n, taken)
		}
		if n := restored(t, a).Counters().StaleAdmitted; n != 0 {
			t.Fatalf("a snapshot in which the group is ready counts %d", n)
		}
		if a.Requeue(taken); a.Counters().StaleAdmitted != 0 {
			t.Fatal(a.Counters())
		}
	}
}
