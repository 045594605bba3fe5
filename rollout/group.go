package rollout

// Group is the completions of one prompt, complete and ready to train.
type Group struct {
	ID       string
	Prompt   []int32
	Rollouts []Rollout // in the order of arrival; len is the objective's G
	Position Position  // of the row that completed it: groups are trained in this order
}

// Position is a row's place in the job's log.
type Position struct {
	Batch uint64 // sequence number of the batch in the spool
	Row   int
}
