package rollout

// Segment is a run of tokens of a Packed row: a prompt (Prefix -1) or a
// completion without its last token, which predicts nothing.
type Segment struct {
	Start, Len int
	Prefix     int // index of the prompt's segment, or -1
}

// Span ties a completion's predictions to where it came from.
type Span struct {
	Group, Rollout int // indices in the slice given to Pack, and in Group.Rollouts
	Start, Len     int // predictions [Start, Start+Len) of Rows and Targets
}

// Packed is one micro-batch without padding, each prompt once.
type Packed struct {
	Tokens    []int32 // [T]
	Positions []int32 // [T]
	Segments  []Segment
	Rows      []int32 // [N] token whose hidden state predicts
	Targets   []int32 // [N]
	Spans     []Span  // in order, covering [0,N)
}

// Pack cuts groups into micro-batches of at most maxTokens tokens, balanced by
// work. A group larger than maxTokens is split between completions, its prompt
// repeated in each part; a single prompt and completion over maxTokens is an
// Invalid fault that names the group. Pack is a pure function of its arguments.
func Pack(groups []Group, maxTokens int) ([]Packed, error) { panic("not built yet") }
