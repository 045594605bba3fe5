//go:build crashpoints

package crashtest

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trainerd/internal/crashpoint"
)

var (
	runs = flag.Int("runs", 108, "jobs in each test")
	seed = flag.Uint64("seed", 1, "of every choice; run N of a test uses seed+N")
)

// point is an instant at which a server is made to die.
type point struct {
	passages int   // the death is at one of the first so many
	jobs     []int // places in variants of the jobs that come by
	later    bool  // only after a death that left steps to repeat
}

var (
	all       = []int{f32, bf16, lagging, ending}
	first     = []int{admitting, f32, bf16, lagging, ending}
	snapshots = []int{f32, bf16, ending}
	points    = map[string]point{
		"job.before_record": {1, all, false}, "job.recorded": {1, all, false},
		"spool.new_segment": {2, all, false}, "spool.payload_written": {3, all, false}, "spool.frame_written": {3, all, false},
		"spool.frame_synced": {3, first, false}, "accept.before_answer": {3, all, false},
		"step.before_record": {3, first, false}, "step.recorded": {3, first, false}, "step.publishing": {1, []int{f32, bf16}, false},
		"replay.record": {1, []int{lagging}, true}, "replay.step": {2, []int{lagging}, true},
		"store.dir_made": {5, all, false}, "store.copied": {6, all, false}, "store.before_rename": {6, all, false}, "store.renamed": {6, all, false},
		"checkpoint.captured": {3, first, false}, "checkpoint.weights_written": {3, all, false}, "checkpoint.queue_written": {2, snapshots, false},
		"checkpoint.before_manifest": {3, first, false}, "checkpoint.before_latest": {3, all, false},
		"retain.before_manifest": {1, []int{f32, lagging}, false}, "retain.before_files": {1, []int{f32, lagging}, false},
		"trim.before": {2, snapshots, false}, "trim.removed": {1, snapshots, false}, "trim.done": {2, snapshots, false},
		"ended.written": {1, []int{ending}, false}, "ended.recorded": {1, []int{ending}, false}, "ended.reclaim": {4, []int{ending}, false},
	}
)

// most is the latest moment of a random death after the server listens.
const most = 120 * time.Millisecond

// schedule draws the job and the deaths of run n: one death at a point, each
// point in turn, and on two runs of three one at a random moment before or after it.
func schedule(n uint64, r *rand.Rand, power bool) (job int, out []strike) {
	names := slices.Sorted(maps.Keys(points))
	name := names[n%uint64(len(names))]
	p := points[name]
	cut := func() bool { return power && r.IntN(4) > 0 }
	random := func() strike {
		return strike{after: time.Duration(r.Int64N(int64(most))), early: r.IntN(12) == 0, power: cut()}
	}
	when := r.IntN(3)
	switch {
	case p.later:
		out = append(out, strike{at: "step.recorded", n: 2 + r.IntN(3), after: 20 * time.Second, power: cut()})
	case when == 1 && !strings.HasPrefix(name, "job."): // a job is created in the first life only
		out = append(out, random())
	}
	out = append(out, strike{at: name, n: 1 + r.IntN(p.passages), after: 20 * time.Second, power: cut()})
	if when == 2 {
		out = append(out, random())
	}
	return p.jobs[(n/uint64(len(names)))%uint64(len(p.jobs))], out
}

// TestKills kills the process: the page cache survives.
func TestKills(t *testing.T) { storm(t, false) }

// TestPowerCuts kills the process and drops what it had not synced, for most deaths.
func TestPowerCuts(t *testing.T) { storm(t, true) }

// TestPowerCutsAfterUnsyncedNames kills the process at each directory that the
// first checkpoint makes, before its name is synced, and cuts the power in the
// life after: what that one put into the directory stays.
func TestPowerCutsAfterUnsyncedNames(t *testing.T) {
	modelDir, refs := references(t)
	total := &tally{points: map[string]int{}}
	for n := range points["store.dir_made"].passages {
		rng := rand.New(rand.NewPCG(*seed, uint64(n)))
		strikes := []strike{
			{at: "store.dir_made", n: n + 1, after: 20 * time.Second},
			{at: "retain.before_manifest", n: 1, after: 20 * time.Second, power: true},
		}
		r := run{variant: variants[lagging], modelDir: modelDir, ref: refs[lagging], strikes: strikes, rng: rng}
		if _, err := r.do(total, t.TempDir()); err != nil {
			t.Errorf("directory %d: %v", n+1, err)
		}
	}
}

// storm runs jobs, three at a time.
func storm(t *testing.T, power bool) {
	modelDir, refs := references(t)
	total := &tally{points: map[string]int{}}
	var next atomic.Int64
	var work sync.WaitGroup
	began := time.Now()
	dir := t.TempDir()
	for range 3 {
		work.Go(func() {
			for !t.Failed() {
				n := next.Add(1) - 1
				if n >= int64(*runs) {
					return
				}
				rng := rand.New(rand.NewPCG(*seed+uint64(n), 5))
				v, strikes := schedule(*seed+uint64(n), rng, power)
				r := run{variant: variants[v], modelDir: modelDir, ref: refs[v], strikes: strikes, rng: rng}
				at := filepath.Join(dir, fmt.Sprint(n))
				if _, err := r.do(total, at); err != nil {
					t.Errorf("seed %d, %s, strikes %+v: %v", *seed+uint64(n), variants[v].name, r.strikes, err)
				}
				os.RemoveAll(at)
			}
		})
	}
	work.Wait()
	total.report(t, time.Since(began))
}

// report prints where deaths fell and holds them to the share that means something.
func (total *tally) report(t *testing.T, took time.Duration) {
	inside := 0
	for p := range crashpoint.Phases + 1 {
		t.Logf("%-8s %4d %s", p, total.phases[p], strings.Repeat("#", total.phases[p]*60/max(total.deaths, 1)))
		if p < crashpoint.Load {
			inside += total.phases[p]
		}
	}
	names := slices.Sorted(maps.Keys(points))
	at := 0
	for _, name := range names {
		at += total.points[name]
		t.Logf("%-28s %4d", name, total.points[name])
	}
	t.Logf("%d runs with %d deaths (%d at points), %.0f %% inside a write or a step; %d power cuts took back %d files or names; readers verified %d checkpoints; %v",
		total.runs, total.deaths, at, 100*float64(inside)/float64(total.deaths), total.cuts, total.lost, total.pulls, took.Round(time.Millisecond))
	if t.Failed() {
		return
	}
	if 100*inside < 80*total.deaths {
		t.Errorf("%d of %d deaths fell inside a write or a step, expected 80 %%", inside, total.deaths)
	}
	for _, name := range names {
		if total.points[name] == 0 && *runs >= len(points) {
			t.Errorf("no server died at %s", name)
		}
	}
}
