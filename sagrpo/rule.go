package sagrpo

import "trainerd/kernels"

// rule is a row of the table of objectives: what tells one from another.
type rule struct {
	rewards  bool // trained from rewards: has advantages, an old policy and a ratio
	sequence bool // one ratio per completion instead of one per token
	scale    kernels.AdvantageScale
	kind     kernels.SurrogateKind // of a token; a sequence-level objective clips like SurrogateClip
	share    share
}

// share is how the terms of tokens are reduced to a loss: what the weight of a
// token is. All denominators are those of the whole optimizer step.
type share uint8

const (
	// shareGroup is (1/Q) sum over groups of (1/G) sum of tokens: 1/(G*Q).
	shareGroup share = iota
	// shareSequence is the mean over B sequences of the mean over active tokens: 1/(B*active of the sequence).
	shareSequence
	// shareFixed is the sum of tokens over B*max_completion_tokens.
	shareFixed
	// shareActive is the sum of tokens over the active tokens of the step.
	shareActive
	// shareWeighted is the sum of w*token over the sum of w, w from the column loss_weights.
	shareWeighted
)

func (r rule) clips() bool { return r.rewards && r.kind == kernels.SurrogateClip }
func (r rule) caps() bool  { return r.kind == kernels.SurrogateCISPO }

// objectives lists the names in the order in which errors show them.
var objectives = []struct {
	name string
	rule rule
}{
	{"sa_grpo", rule{rewards: true, scale: kernels.ScaleNone, share: shareGroup}},
	{"grpo", rule{rewards: true, scale: kernels.ScaleStd, share: shareSequence}},
	{"dr_grpo", rule{rewards: true, scale: kernels.ScaleNone, share: shareFixed}},
	{"dapo", rule{rewards: true, scale: kernels.ScaleStd, share: shareActive}},
	{"gspo", rule{rewards: true, sequence: true, scale: kernels.ScaleStd, share: shareSequence}},
	{"cispo", rule{rewards: true, scale: kernels.ScaleStd, kind: kernels.SurrogateCISPO, share: shareActive}},
	{"cross_entropy", rule{kind: kernels.SurrogateNLL, share: shareWeighted}},
}

// canonical maps an alias to the name that it stands for.
func canonical(name string) string {
	if name == "bnpo" {
		return "dapo"
	}
	return name
}

// ruleOf finds an objective by name or alias.
func ruleOf(name string) (rule, bool) {
	name = canonical(name)
	for _, o := range objectives {
		if o.name == name {
			return o.rule, true
		}
	}
	return rule{}, false
}
