package rollout

// Group is the completions of one prompt, complete and ready to train.
type Group struct {
	ID         string
	Prompt     []int32
	Rollouts   []Rollout // in the order of arrival; len is the objective's G
	Components []string  // names of Rollout.Components, sorted; nil when no row has components
	Position   Position  // of the row that completed it: groups are trained in this order
}

// Tokens counts the prompt once and the completions, as Depth does.
func (g *Group) Tokens() int64 {
	n := int64(len(g.Prompt))
	for i := range g.Rollouts {
		n += int64(len(g.Rollouts[i].Completion))
	}
	return n
}

// Bytes is the size of the group's data, as Depth counts it.
func (g *Group) Bytes() int64 {
	n := 4 * int64(len(g.Prompt))
	for i := range g.Rollouts {
		n += g.Rollouts[i].payload()
	}
	return n
}

// Position is a row's place in the job's log.
type Position struct {
	Batch uint64 // sequence number of the batch in the spool
	Row   int
}

// Status is where a group is in its life.
type Status uint8

// The life of a group. Open, Ready and Taken groups are in memory; Trained and
// Dropped ones are closed for ever and only their fingerprint is kept.
const (
	Unknown Status = iota // never seen
	Open                  // waits for more rows
	Ready                 // complete, waits for a step
	Taken                 // handed to a step that has not been recorded yet
	Trained
	Dropped
)

var statusNames = [...]string{"unknown", "open", "queued", "training", "trained", "dropped"}

// String returns the name that the API shows.
func (s Status) String() string { return statusNames[s] }

// Reasons under which the assembler itself drops a group, or trains it although
// it is incomplete. Owners may pass others to Mark.
const (
	ReasonPolicyLag    = "policy_lag"    // too stale when a step wanted it
	ReasonGroupTimeout = "group_timeout" // never filled
)

// State is a Status with what belongs to it.
type State struct {
	Status Status
	Step   int64  // of Trained: the optimizer step
	Reason string // of Dropped, and of groups that were settled incomplete
}

// GroupState is a group by name.
type GroupState struct {
	ID    string
	Rows  int // rows it holds, or held when it was closed
	State State
}

// Depth is what waits in the queue: open and ready groups, not taken ones.
type Depth struct {
	Rollouts       int
	Tokens         int64 // each prompt once
	Bytes          int64 // of the rows' payload
	GroupsComplete int
	GroupsOpen     int
}

// Counters only grow. Dropped maps count by reason.
type Counters struct {
	Batches           int64
	Rollouts          int64 // accepted into groups
	Duplicates        int64 // ignored: same rollout_id, same content
	MissingPolicyStep int64
	GroupsCompleted   int64
	GroupsIncomplete  int64 // trained by timeout with fewer rows
	GroupsTrained     int64
	RolloutsTrained   int64
	StaleAdmitted     int64 // groups taken although they were too stale; goes back with those that are requeued
	StaleDelayed      int64 // groups that a step was put off for
	GroupsDropped     map[string]int64
	RolloutsDropped   map[string]int64
}
