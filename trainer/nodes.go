package trainer

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"trainerd/internal/fault"
	"trainerd/storage"
)

// NodeReport is what an inference node says of itself.
type NodeReport struct {
	Step    int64  // that it serves, -1: none yet
	Digest  string // SHA-256 of that checkpoint's manifest, "" with step -1
	State   string // serving, loading, failed or stopped
	Message string // for people, at most 1 KiB
	TTL     time.Duration
}

// Node is an inference node as the API shows it.
type Node struct {
	Name     string    `json:"node"`
	Step     int64     `json:"step"`
	Digest   string    `json:"digest"`
	State    string    `json:"state"`
	Message  string    `json:"message"`
	First    time.Time `json:"first_seen"`
	LastSeen time.Time `json:"last_seen"`
	Silent   bool      `json:"silent"`      // nothing was heard for as long as its last report was good for
	Matches  *bool     `json:"matches"`     // the digest is that of the step's checkpoint; null when the server no longer knows
	LagSteps int64     `json:"lag_steps"`   // newest checkpoint's step less the one served
	LagSecs  float64   `json:"lag_seconds"` // since the first checkpoint that it does not serve yet
}

const (
	maxNodes       = 512 // of a job
	maxNodeMessage = 1 << 10
	// Reports are good for DefaultNodeTTL unless they say otherwise; a node that
	// was silent for nodeForgotten is dropped.
	DefaultNodeTTL = time.Minute
	maxNodeTTL     = time.Hour
	nodeForgotten  = 24 * time.Hour
	maxPublished   = 1024 // publications remembered to tell lags
)

// NodeStates are what a node may say of itself.
var NodeStates = []string{"serving", "loading", "failed", "stopped"}

// nodes are the nodes of one job, in memory: after a restart each is known again
// with its next report.
type nodes struct {
	mu        sync.Mutex
	byName    map[string]*nodeEntry
	published []publication // by time; steps never fall
}

type nodeEntry struct {
	NodeReport
	first, seen time.Time
}

type publication struct {
	step   int64
	at     time.Time
	digest string
}

func (e *nodeEntry) silent(now time.Time) bool { return now.Sub(e.seen) > e.TTL }

// publish remembers a checkpoint, of which lags are counted.
func (n *nodes) publish(man storage.Manifest) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if k := len(n.published); k > 0 && n.published[k-1].step > man.Step {
		return
	}
	digest, err := man.Digest()
	if err != nil {
		digest = "" // matches nothing
	}
	p := publication{man.Step, man.Created, digest}
	if !slices.Contains(n.published, p) {
		n.published = append(n.published, p)
	}
	if len(n.published) > maxPublished {
		n.published = slices.Clone(n.published[len(n.published)-maxPublished:])
	}
}

// report takes a node's report. A new node may take the place of one that is silent.
func (n *nodes) report(name string, r NodeReport, now time.Time) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.forget(now)
	e := n.byName[name]
	if e == nil {
		if len(n.byName) >= maxNodes && !n.evictSilent(now) {
			return &fault.Error{Kind: fault.Busy, Code: "too_many_nodes", RetryAfter: DefaultNodeTTL,
				Msg: fmt.Sprintf("%d nodes report on the job, which is the limit", maxNodes)}
		}
		if n.byName == nil {
			n.byName = map[string]*nodeEntry{}
		}
		e = &nodeEntry{first: now}
		n.byName[name] = e
	}
	e.NodeReport, e.seen = r, now
	return nil
}

// forget drops nodes that were silent for long. Called with mu held.
func (n *nodes) forget(now time.Time) {
	for name, e := range n.byName {
		if now.Sub(e.seen) > e.TTL+nodeForgotten {
			delete(n.byName, name)
		}
	}
}

// evictSilent drops the node that has been silent for longest. Called with mu held.
func (n *nodes) evictSilent(now time.Time) bool {
	oldest := ""
	for name, e := range n.byName {
		if e.silent(now) && (oldest == "" || e.seen.Before(n.byName[oldest].seen)) {
			oldest = name
		}
	}
	delete(n.byName, oldest)
	return oldest != ""
}

// list shows the nodes by name. latest is the step of the newest checkpoint, -1 for none.
func (n *nodes) list(latest int64, now time.Time) []Node {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.forget(now)
	out := make([]Node, 0, len(n.byName))
	for name, e := range n.byName {
		v := Node{Name: name, Step: e.Step, Digest: e.Digest, State: e.State, Message: e.Message,
			First: e.first, LastSeen: e.seen, Silent: e.silent(now), LagSteps: max(latest-e.Step, 0)}
		if v.LagSteps > 0 {
			for _, p := range n.published {
				if p.step > e.Step {
					v.LagSecs = max(now.Sub(p.at).Seconds(), 0)
					break
				}
			}
		}
		for _, p := range n.published {
			if p.step == e.Step {
				same := p.digest == e.Digest || v.Matches != nil && *v.Matches
				v.Matches = &same
			}
		}
		out = append(out, v)
	}
	slices.SortFunc(out, func(a, b Node) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// ReportNode takes what an inference node says it serves.
func (j *Job) ReportNode(name string, r NodeReport) error {
	if err := checkName("node", name); err != nil {
		return err
	}
	if strings.Contains(name, "/") { // it is one element of the path
		return fault.BadField("node", strconv.Quote(name), "a name without /")
	}
	if r.TTL == 0 {
		r.TTL = DefaultNodeTTL
	}
	digestFits := len(r.Digest) == 64 && strings.Trim(r.Digest, "0123456789abcdef") == "" || r.Digest == ""
	switch {
	case r.Step < -1 || r.Step > maxSteps:
		return fault.BadField("step", r.Step, "a step, or -1 for none")
	case !digestFits || (r.Step < 0) != (r.Digest == ""):
		return fault.BadField("digest", strconv.Quote(clip(r.Digest)), "64 lower-case hex digits with a step, nothing without")
	case !slices.Contains(NodeStates, r.State):
		return fault.BadField("state", strconv.Quote(clip(r.State)), "one of "+strings.Join(NodeStates, ", "))
	case len(r.Message) > maxNodeMessage || !utf8.ValidString(r.Message):
		return fault.BadField("message", fmt.Sprintf("%d bytes", len(r.Message)), fmt.Sprintf("at most %d bytes of UTF-8", maxNodeMessage))
	case r.TTL < time.Second || r.TTL > maxNodeTTL:
		return fault.BadField("ttl", r.TTL, fmt.Sprintf("a duration from 1s to %v", maxNodeTTL))
	}
	return j.nodes.report(name, r, time.Now().UTC())
}

// Nodes lists who serves what.
func (j *Job) Nodes() []Node {
	j.mu.Lock()
	latest := j.latest
	j.mu.Unlock()
	step := int64(-1)
	if latest != nil {
		step = latest.Step
		j.nodes.publish(*latest) // a restart has not seen it published
	}
	return j.nodes.list(step, time.Now().UTC())
}
