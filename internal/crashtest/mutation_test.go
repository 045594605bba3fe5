//go:build crashpoints

package crashtest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// mutation is a durable write that is left out, and deaths that show it. The
// deaths alone must leave the suite green, with the mutation it must turn red.
type mutation struct {
	off     string
	why     string // what it is for
	variant int
	strikes func(r *rand.Rand) []strike
	segment int64 // as in run
}

// cuts are power cuts at a point, at a random passage each.
func cuts(at string, passages, n int) func(*rand.Rand) []strike {
	return func(r *rand.Rand) []strike {
		out := make([]strike, n)
		for i := range out {
			out[i] = strike{at: at, n: 1 + r.IntN(passages), after: 5 * time.Second, power: true}
		}
		return out
	}
}

var mutations = []mutation{
	{"records.step", "the record of a step", f32, func(r *rand.Rand) []strike {
		return []strike{{at: "step.recorded", n: 2 + r.IntN(3), after: 5 * time.Second}}
	}, 0},
	{"records.fsync", "the sync of the database", f32, cuts("step.before_record", 4, 3), 0},
	{"data.dir_name", "the sync of the data directory's names", f32, cuts("spool.frame_synced", 3, 2), 0},
	{"spool.dir_name", "the sync of a new spool directory's name", f32, cuts("spool.frame_synced", 3, 2), 0},
	{"spool.header", "the sync of a new segment's header", f32, cuts("spool.payload_written", 2, 12), 0},
	{"spool.segment_name", "the sync of a new segment's name", f32, cuts("spool.payload_written", 4, 4), 0},
	{"spool.ended", "the sync of a segment's end before the next one begins", f32, cuts("spool.new_segment", 2, 4), 0},
	{"spool.frame", "the sync of an accepted batch", f32, cuts("spool.payload_written", 4, 4), 0},
	{"spool.recovered", "the sync of a frame that a killed process wrote", f32, func(r *rand.Rand) []strike {
		return []strike{{at: "spool.frame_written", n: 2, after: 5 * time.Second}, {at: "spool.payload_written", n: 1, after: 5 * time.Second, power: true}}
	}, 0},
	{"spool.recovered_name", "the sync of a segment's name that a killed process left", f32, func(r *rand.Rand) []strike {
		return []strike{{at: "spool.new_segment", n: 2, after: 5 * time.Second}, {at: "spool.payload_written", n: 2, after: 5 * time.Second, power: true}}
	}, 0},
	{"store.dir_name", "the sync of a new directory's name in the store", f32, cuts("step.before_record", 4, 3), 0},
	{"store.file", "the sync of a stored file", f32, cuts("step.before_record", 4, 3), 0},
	{"store.file_name", "the sync of a stored file's name", f32, cuts("step.before_record", 4, 3), 0},
	{"store.settled", "the sync of names that a killed process left", lagging, func(r *rand.Rand) []strike {
		// A checkpoint without state is six files, its manifest the fifth.
		return []strike{{at: "store.renamed", n: 5 + 6*r.IntN(3), after: 5 * time.Second}, {at: "store.copied", n: 2 + r.IntN(2), after: 5 * time.Second, power: true}}
	}, 0},
	{"queue.bound", "the bound of trimming: what the snapshot stands for", f32, func(r *rand.Rand) []strike {
		return []strike{{at: "trim.done", n: 1 + r.IntN(3), after: 10 * time.Second}}
	}, 1},
	{"queue.committed", "trimming only once the snapshot is committed", f32, func(r *rand.Rand) []strike {
		return []strike{{at: "checkpoint.queue_written", n: 1 + r.IntN(3), after: 10 * time.Second}}
	}, 0},
	{"ended.file", "the sync of what is kept of an ended job", ending, func(r *rand.Rand) []strike {
		return []strike{{at: "ended.reclaim", n: 2 + r.IntN(3), after: 10 * time.Second, power: true}}
	}, 0},
	{"ended.name", "the sync of its name", ending, func(r *rand.Rand) []strike {
		return []strike{{at: "ended.reclaim", n: 2 + r.IntN(3), after: 10 * time.Second, power: true}}
	}, 0},
}

// TestMutations leaves each out in turn. The same run with everything in place
// comes first, so that what turns red is the mutation.
func TestMutations(t *testing.T) {
	const tries = 10
	modelDir, refs := references(t)
	for _, m := range mutations {
		t.Run(m.off, func(t *testing.T) {
			t.Parallel()
			total := &tally{points: map[string]int{}}
			do := func(try uint64, off string) error {
				rng := rand.New(rand.NewPCG(*seed+try, 11))
				dir := filepath.Join(t.TempDir(), fmt.Sprint(try, "-", off))
				defer os.RemoveAll(dir)
				_, err := run{variant: variants[m.variant], modelDir: modelDir, ref: refs[m.variant], strikes: m.strikes(rng), rng: rng, off: off, segment: m.segment}.do(total, dir)
				return err
			}
			for try := range uint64(tries) {
				if try == 0 {
					if err := do(try, ""); err != nil {
						t.Fatalf("seed %d with everything in place: %v", *seed+try, err)
					}
				}
				if err := do(try, m.off); err != nil {
					first, _, _ := strings.Cut(err.Error(), "\n")
					t.Logf("without %s (%s), red in run %d: %.200s", m.off, m.why, try+1, first)
					return
				}
			}
			t.Errorf("without %s (%s) the suite stays green in %d runs", m.off, m.why, tries)
		})
	}
}
