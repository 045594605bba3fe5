//go:build crashpoints

package crashtest

import (
	"flag"
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
	kills = flag.Int("kills", 110, "deaths of the server in each test, at least")
	seed  = flag.Uint64("seed", 1, "of every choice; run N of a test uses seed+N")
)

// points are where a server is made to die, and how often the point is passed
// in a life, about: the death is at a random one of them.
var points = map[string]int{
	"job.before_record": 1, "job.recorded": 1,
	"spool.new_segment": 1, "spool.payload_written": 2, "spool.frame_written": 2, "spool.frame_synced": 2, "accept.before_answer": 2,
	"step.before_record": 2, "step.recorded": 2, "replay.record": 4, "replay.step": 2,
	"store.copied": 6, "store.before_rename": 6, "store.renamed": 6,
	"checkpoint.weights_written": 2, "checkpoint.before_manifest": 2, "checkpoint.before_latest": 2,
	"retain.before_manifest": 1, "retain.before_files": 1,
}

// most is the latest moment of a random death after the server listens.
const most = 150 * time.Millisecond

// schedule draws the deaths of run n: every other one at a point, in turn, so
// that each point has its turn; the rest at random moments.
func schedule(n uint64, r *rand.Rand, deaths int, power bool) []strike {
	var names []string
	for name := range points {
		if !strings.HasPrefix(name, "job.") { // a job is created in the first life only
			names = append(names, name)
		}
	}
	slices.Sort(names)
	out := make([]strike, deaths)
	for i := range out {
		s := strike{after: time.Duration(r.Int64N(int64(most))), early: r.IntN(8) == 0, power: power && r.IntN(3) > 0}
		if i%2 == 0 {
			s.at = names[(n*uint64(deaths/2)+uint64(i/2))%uint64(len(names))]
			s.n = 1 + r.IntN(points[s.at])
			s.after = 5 * most
		}
		out[i] = s
	}
	switch n % 6 {
	case 0:
		out[0].at, out[0].n = "job.before_record", 1
	case 3:
		out[0].at, out[0].n = "job.recorded", 1
	}
	return out
}

// TestKills kills the process: the page cache survives.
func TestKills(t *testing.T) { storm(t, false) }

// TestPowerCuts kills the process and drops what it had not synced, for most deaths.
func TestPowerCuts(t *testing.T) { storm(t, true) }

// storm runs jobs, two at a time, until there were enough deaths.
func storm(t *testing.T, power bool) {
	const perRun = 8
	modelDir, refs := references(t)
	total := &tally{points: map[string]int{}}
	var next atomic.Uint64
	var work sync.WaitGroup
	began := time.Now()
	dir := t.TempDir()
	for range 2 {
		work.Go(func() {
			for !t.Failed() {
				total.mu.Lock()
				enough := total.deaths >= *kills
				total.mu.Unlock()
				n := next.Add(1) - 1
				if enough && n >= 2*uint64(len(variants)) {
					return
				}
				rng := rand.New(rand.NewPCG(*seed+n, 5))
				v := int(n) % len(variants)
				r := run{variant: variants[v], modelDir: modelDir, ref: refs[v], strikes: schedule(n, rng, perRun, power), rng: rng}
				at := filepath.Join(dir, variants[v].name+strings.Repeat("x", int(n)/len(variants)))
				if _, err := r.do(total, at); err != nil {
					t.Errorf("seed %d, %s, strikes %+v: %v", *seed+n, variants[v].name, r.strikes, err)
				}
				os.RemoveAll(at)
			}
		})
	}
	work.Wait()
	total.report(t, next.Load(), time.Since(began))
}

// report prints where deaths fell and holds them to the share that means something.
func (total *tally) report(t *testing.T, runs uint64, took time.Duration) {
	inside := 0
	for p := range crashpoint.Phases + 1 {
		t.Logf("%-8s %4d %s", p, total.phases[p], strings.Repeat("#", total.phases[p]*60/max(total.deaths, 1)))
		if p < crashpoint.Load {
			inside += total.phases[p]
		}
	}
	names := make([]string, 0, len(points))
	at := 0
	for name := range points {
		names = append(names, name)
		at += total.points[name]
	}
	slices.Sort(names)
	for _, name := range names {
		t.Logf("%-28s %4d", name, total.points[name])
	}
	t.Logf("%d deaths (%d at points) in %d runs, %.0f %% inside a write or a step; %d power cuts took back %d files or names; readers verified %d checkpoints; %v",
		total.deaths, at, runs, 100*float64(inside)/float64(total.deaths), total.cuts, total.lost, total.pulls, took.Round(time.Millisecond))
	if t.Failed() {
		return
	}
	if 100*inside < 80*total.deaths {
		t.Errorf("%d of %d deaths fell inside a write or a step, expected 80 %%", inside, total.deaths)
	}
	for _, name := range names {
		if total.points[name] == 0 {
			t.Errorf("no server died at %s", name)
		}
	}
}
