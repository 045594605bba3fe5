package trainer

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"trainerd/internal/fault"
	"trainerd/rollout"
)

// clock is a time that tests move.
type clock struct{ now time.Time }

func (c *clock) pass(d time.Duration) time.Time { c.now = c.now.Add(d); return c.now }

// TestDrainWait holds the estimate against queues that drain as it assumes.
func TestDrainWait(t *testing.T) {
	const second = time.Second
	for _, tc := range []struct {
		name    string
		steps   []time.Duration // of takes of 4 rows, 100 tokens, 1000 bytes, that are done
		under   time.Duration   // a take is being trained for so long; negative: none is
		stalled bool
		need    load
		want    time.Duration
		takes   int
	}{
		{"nothing measured", nil, -1, false, load{rows: 1}, 0, 1},
		{"the first is under way", nil, 3 * second, false, load{rows: 100}, 3 * second, 1},
		{"the next take has room", []time.Duration{10 * second}, 4 * second, false, load{rows: 4}, 6 * second, 1},
		{"rows need three", []time.Duration{10 * second}, 4 * second, false, load{rows: 9}, 26 * second, 3},
		{"tokens need more than rows", []time.Duration{10 * second, 20 * second}, 0, false, load{rows: 1, tokens: 250}, 45 * second, 3},
		{"bytes need most", []time.Duration{10 * second}, 0, false, load{rows: 1, tokens: 101, bytes: 4001}, 50 * second, 5},
		{"a step takes longer than those before", []time.Duration{10 * second}, 30 * second, false, load{rows: 4}, 15 * second, 1},
		{"between takes", []time.Duration{10 * second}, -1, false, load{rows: 8}, 10 * second, 2},
		{"only the latest count", []time.Duration{9999 * second, second, second, second, second, second, second, second, second}, 0, false, load{rows: 4}, second, 1},
		{"held after the latest", []time.Duration{10 * second, 3 * second}, -1, true, load{rows: 8}, 17 * second, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := clock{time.Unix(1e9, 0)}
			var d drain
			for _, s := range tc.steps {
				d.took(c.now, load{4, 100, 1000})
				d.done(c.pass(s))
				if !tc.stalled {
					c.pass(time.Hour) // nothing to do, which is not counted
				}
			}
			if tc.under >= 0 {
				d.took(c.now, load{4, 100, 1000})
				c.pass(tc.under)
			}
			wait, takes, ok := d.wait(c.now, tc.need, tc.stalled)
			if wait != tc.want || takes != tc.takes || ok != (len(tc.steps) > 0 || tc.under > 0) {
				t.Errorf("%v after %d takes, measured %v; expected %v after %d", wait, takes, ok, tc.want, tc.takes)
			}
		})
	}
}

// TestWhoWaitsGetsIn drains queues at a random pace on a clock of its own: when
// the wait is over the rows are gone, or one step more does it, whose time
// differs from the mean by as much as steps differ (here a factor of 1.5).
func TestWhoWaitsGetsIn(t *testing.T) {
	for seed := range uint64(500) {
		r := rand.New(rand.NewPCG(seed, 3))
		c := clock{time.Unix(1e9, 0)}
		pace := time.Duration(1+r.IntN(60)) * time.Second
		step := func() time.Duration { return time.Duration(float64(pace) * (1 + r.Float64()/2)) }
		perTake := int64(1 + r.IntN(20))
		var d drain
		for range 1 + r.IntN(12) {
			d.took(c.now, load{rows: perTake})
			d.done(c.pass(step()))
		}
		d.took(c.now, load{rows: perTake})
		left := step() // of the step under way
		elapsed := time.Duration(r.Float64() * float64(left))
		c.pass(elapsed)
		need := int64(1 + r.IntN(100))
		wait, takes, _ := d.wait(c.now, load{rows: need}, false)
		// What really happens: the take after the one under way, then one after each step.
		real := left - elapsed
		for gone := perTake; gone < need; gone += perTake {
			real += step()
		}
		most := 1.5*real.Seconds() + 1.5*pace.Seconds()
		least := real.Seconds()/1.5 - 1.5*pace.Seconds()
		if got := wait.Seconds(); got > most || got < least {
			t.Errorf("seed %d: wait %v for %d takes, room after %v (pace %v)", seed, wait, takes, real, pace)
		}
	}
}

// queued is a job with a queue of pairs, and bounds.
func queued(t *testing.T, l Limits, groups int) *Job {
	t.Helper()
	j := &Job{m: &Manager{limits: l.withDefaults()}}
	j.spec.Batch.GroupsPerStep = 2
	j.asm = rollout.NewAssembler(rollout.AssemblerOptions{GroupSize: 2, MaxPolicyLag: -1, GroupTimeout: time.Hour})
	if groups > 0 {
		if _, err := j.asm.Add(1, pairs("q", groups)); err != nil {
			t.Fatal(err)
		}
	}
	return j
}

// pairs are groups of two rows of 4 tokens each after a prompt of 2.
func pairs(name string, groups int) *rollout.Batch {
	b := &rollout.Batch{HasReward: true, Received: time.Unix(1e9, 0)}
	for g := range groups {
		for range 2 {
			b.Rollouts = append(b.Rollouts, rollout.Rollout{GroupID: name + string(rune('a'+g)), Prompt: []int32{1, 2}, Completion: []int32{3, 4, 5, 6}, PolicyStep: rollout.NoPolicyStep})
		}
	}
	return b
}

func TestRoomSaysWhyAndWhen(t *testing.T) {
	now := time.Unix(1e9+100, 0)
	measured := func(j *Job) {
		j.drain.took(now.Add(-40*time.Second), load{4, 20, 100})
		j.drain.done(now.Add(-20 * time.Second))
		j.drain.took(now.Add(-5*time.Second), load{4, 20, 100})
		j.training = &consumption{}
	}
	for _, tc := range []struct {
		name   string
		limits Limits
		own    LimitsSpec
		groups int
		add    int
		change func(*Job)
		code   string
		fields string
		wait   time.Duration
		says   string
	}{
		{"there is room", Limits{MaxQueuedRollouts: 8}, LimitsSpec{}, 3, 1, nil, "", "", 0, ""},
		{"rows", Limits{MaxQueuedRollouts: 8}, LimitsSpec{}, 4, 1, measured, "queue_full", "limits.max_queued_rollouts", 15 * time.Second, "8 rollouts of at most 8"},
		{"tokens of the job", Limits{}, LimitsSpec{MaxQueuedTokens: 40}, 4, 2, measured, "queue_full", "limits.max_queued_tokens", 35 * time.Second, "after 2 more"},
		{"bytes of the job", Limits{}, LimitsSpec{MaxQueuedBytes: 200}, 4, 1, measured, "queue_full", "limits.max_queued_bytes", 15 * time.Second, "bytes"},
		{"bytes of the server", Limits{MaxQueuedBytes: 200}, LimitsSpec{MaxQueuedBytes: 100000}, 4, 1, measured, "queue_full", "limits.max_queued_bytes", 15 * time.Second, "bytes"},
		{"two bounds", Limits{MaxQueuedRollouts: 8, MaxQueuedTokens: 41}, LimitsSpec{}, 4, 1, measured, "queue_full", "limits.max_queued_rollouts limits.max_queued_tokens", 15 * time.Second, "8 rollouts of at most 8, 40 tokens of at most 41"},
		{"paused", Limits{MaxQueuedRollouts: 8}, LimitsSpec{}, 4, 1, func(j *Job) { measured(j); j.rec.Paused = true }, "queue_full", "limits.max_queued_rollouts", time.Minute, "paused"},
		{"nothing measured", Limits{MaxQueuedRollouts: 8}, LimitsSpec{}, 4, 1, nil, "queue_full", "limits.max_queued_rollouts", 5 * time.Second, "no step was measured"},
		{"held by the store", Limits{MaxQueuedRollouts: 8}, LimitsSpec{}, 4, 1, func(j *Job) {
			measured(j)
			j.drain.under.began = now.Add(-100 * time.Second)
			j.drain.done(now.Add(-99 * time.Second))
			j.stalled = stall{act: actHold}
		},
			"queue_full", "limits.max_queued_rollouts", 50 * time.Second, "checkpoint"},
		{"one complete group of two", Limits{MaxQueuedRollouts: 2}, LimitsSpec{}, 1, 1, nil, "queue_full", "limits.max_queued_rollouts", 5 * time.Second, "open groups"},
		{"longer than the longest", Limits{MaxQueuedRollouts: 8}, LimitsSpec{}, 4, 1, func(j *Job) { measured(j); j.drain.recent[0].busy = time.Hour }, "queue_full", "limits.max_queued_rollouts", 10 * time.Minute, ""},
		{"never", Limits{MaxQueuedRollouts: 8}, LimitsSpec{MaxQueuedTokens: 7}, 0, 1, nil, "batch_too_large", "limits.max_queued_tokens", 0, "alone"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			j := queued(t, tc.limits, tc.groups)
			j.spec.Limits = tc.own
			if tc.change != nil {
				tc.change(j)
			}
			err := j.room(batchLoad(pairs("new", tc.add)), now, load{})
			if tc.code == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			f, ok := fault.As(err)
			if !ok {
				t.Fatalf("error %v", err)
			}
			var names []string
			for _, x := range f.Fields {
				names = append(names, x.Name)
			}
			if f.Code != tc.code || strings.Join(names, " ") != tc.fields || f.RetryAfter != tc.wait || !strings.Contains(f.Msg, tc.says) {
				t.Errorf("%s %v after %v: %s", f.Code, names, f.RetryAfter, f.Msg)
			}
		})
	}
}
