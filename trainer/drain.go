package trainer

import (
	"math"
	"time"

	"trainerd/rollout"
)

// load is what rows take in a queue.
type load struct {
	rows   int64
	tokens int64 // each prompt once
	bytes  int64
}

func (l load) plus(m load) load {
	return load{l.rows + m.rows, l.tokens + m.tokens, l.bytes + m.bytes}
}

// beyond is by how much l exceeds the bounds, and 0 where it does not.
func (l load) beyond(most load) load {
	return load{max(0, l.rows-most.rows), max(0, l.tokens-most.tokens), max(0, l.bytes-most.bytes)}
}

// batchLoad is at most what a batch adds to a queue.
func batchLoad(b *rollout.Batch) load {
	return load{rows: int64(len(b.Rollouts)), tokens: b.Tokens(), bytes: b.Bytes()}
}

// load is what the groups of a consumption took in the queue.
func (c *consumption) load() load {
	var l load
	for i := range c.groups {
		g := &c.groups[i]
		l = l.plus(load{int64(len(g.Rollouts)), g.Tokens(), g.Bytes()})
	}
	return l
}

// drainWindow is how many takes the rate is a mean of: enough to even out groups
// of different length, few enough to follow a change within minutes.
const drainWindow = 8

// drain is how fast a job's steps empty its queue. Rows leave the queue when
// they are taken; the time until the next take is that of the steps on them and
// of what training waited for after them, but not the time without work.
type drain struct {
	recent []taken // newest last
	under  taken   // being trained; began is zero when nothing is
}

// taken is one take.
type taken struct {
	began time.Time
	busy  time.Duration // until the next take could have followed
	load  load
}

func (d *drain) took(now time.Time, l load) { d.under = taken{began: now, load: l} }

// done says that what was taken is trained.
func (d *drain) done(now time.Time) {
	if d.under.began.IsZero() { // a replay, whose pace says nothing
		return
	}
	d.under.busy = now.Sub(d.under.began)
	d.recent = append(d.recent, d.under)
	if len(d.recent) > drainWindow {
		d.recent = append(d.recent[:0], d.recent[1:]...)
	}
	d.under = taken{}
}

// held adds what the next take waited for besides rows.
func (d *drain) held(wait time.Duration) {
	if n := len(d.recent); n > 0 && d.under.began.IsZero() {
		d.recent[n-1].busy += wait
	}
}

// wait is how long it will be until steps have taken l, at the pace of late, and
// how many takes that needs. stalled says that the next take waits for something
// else than rows. ok is false when nothing was measured.
func (d *drain) wait(now time.Time, l load, stalled bool) (wait time.Duration, takes int, ok bool) {
	recent, under := d.recent, d.under
	if n := len(recent); stalled && under.began.IsZero() && n > 0 { // the time of the latest take goes on
		recent, under = recent[:n-1], recent[n-1]
	}
	var elapsed time.Duration
	if !under.began.IsZero() {
		elapsed = now.Sub(under.began)
	}
	if len(recent) == 0 { // the first may take as long again as it has
		return elapsed, 1, elapsed > 0
	}
	var sum taken
	for _, t := range recent {
		sum.busy += t.busy
		sum.load = sum.load.plus(t.load)
	}
	n := len(recent)
	count := func(need, taken int64) int {
		if need == 0 || taken == 0 {
			return 0
		}
		return int(math.Ceil(float64(need) * float64(n) / float64(taken)))
	}
	takes = max(1, count(l.rows, sum.load.rows), count(l.tokens, sum.load.tokens), count(l.bytes, sum.load.bytes))
	each := sum.busy / time.Duration(n)
	first := each - elapsed
	if first <= 0 { // it takes longer than those before, and those after may as well
		first = elapsed / 2
		each = (sum.busy + elapsed + first) / time.Duration(n+1)
	}
	if under.began.IsZero() {
		first = 0
	}
	return first + time.Duration(takes-1)*each, takes, true
}

// stall is what keeps a job from starting a step that it has work for.
type stall struct {
	act     action // actHold, actDelay or none
	since   time.Time
	awaited map[string]bool // open groups that the next take was put off for
}

// await remembers that a step was put off for open groups.
func (h *stall) await(ids []string) {
	if h.awaited == nil {
		h.awaited = map[string]bool{}
	}
	for _, id := range ids {
		h.awaited[id] = true
	}
}

// settle returns how many groups the take that follows was put off for.
func (h *stall) settle() int64 {
	n := int64(len(h.awaited))
	h.awaited = nil
	return n
}

// hold counts the time that training waits for the publication under way or for
// open groups.
func (j *Job) hold(act action, now time.Time) {
	if act != actHold && act != actDelay {
		act = actWait
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	h := &j.stalled
	if h.act == act {
		return
	}
	waited := now.Sub(h.since)
	switch h.act {
	case actHold:
		j.counts.PublishWaits++
		j.counts.PublishWaitSeconds += waited.Seconds()
		j.drain.held(waited)
	case actDelay:
		j.counts.DelaySeconds += waited.Seconds()
		j.drain.held(waited)
	}
	h.act, h.since = act, now
}
