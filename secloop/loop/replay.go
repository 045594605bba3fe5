package loop

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"trainerd/internal/fault"
	"trainerd/secloop"
	"trainerd/secloop/scenario"
)

// Pick says which recorded episode is meant.
type Pick struct {
	Step  int64 // 0: the last one
	Group int   // index of the incident within the step
	Index int   // of the strategy within the group
}

// Recorded finds an episode in a run's directory, its prompt filled in.
func Recorded(dir string, p Pick) (Record, error) {
	var found Record
	ok, prompt := false, ""
	suffix := fmt.Sprintf("-%d", p.Group)
	err := readLines(filepath.Join(dir, fileEpisodes), func(r Record) error {
		if p.Step > 0 && r.Step != p.Step || !strings.HasSuffix(r.Group, fmt.Sprintf("-%d%s", r.Step-1, suffix)) {
			return nil
		}
		if r.Index == 0 {
			prompt = r.Prompt
		}
		if r.Index == p.Index {
			r.Prompt = prompt
			found, ok = r, true // a later line of the same episode counts
		}
		return nil
	})
	if err == nil && !ok {
		err = fault.New(fault.NotFound, "no_episode", "find episode %d of incident %d of step %d in %s: there is none", p.Index, p.Group, p.Step, dir)
	}
	return found, err
}

// Show prints a recorded episode step by step.
func (r Record) Show(w io.Writer) {
	fmt.Fprintf(w, "episode    step %d, group %s, strategy %d, sampled by policy step %d, %d tokens\n", r.Step, r.Group, r.Index, r.Policy, r.Tokens)
	fmt.Fprintf(w, "truth      %s (%s) from %s against %s; hidden from the policy\n", r.Truth.Attack, tactic(r.Truth.Attack), r.Truth.Source, r.Truth.Target)
	fmt.Fprintf(w, "prompt     %s\n", strings.ReplaceAll(strings.TrimSpace(r.Prompt), "\n", "\n           "))
	fmt.Fprintf(w, "strategy   %s\n", printable(r.Completion))
	if r.Void != "" {
		fmt.Fprintf(w, "void       %s\n", r.Void)
		return
	}
	s, err := secloop.ParseStrategy(r.Completion)
	if err != nil {
		fmt.Fprintf(w, "format     %v\n", err)
	}
	for i, c := range s {
		a, err := scenario.ParseCall(c)
		if err != nil {
			fmt.Fprintf(w, "call %d     %s refused: %v\n", i, c.Tool, err)
			continue
		}
		fmt.Fprintf(w, "call %d     %s: %s\n", i, c.Tool, effects(a))
	}
	for _, e := range r.Feedback.Errors {
		fmt.Fprintf(w, "error      %s\n", printable(e))
	}
	for _, st := range r.Stages {
		what := "stopped"
		if st.Succeeded {
			what = "SUCCEEDED"
		}
		fmt.Fprintf(w, "stage      %s: %s (count %d, %d packets%s)\n", st.Name, what, st.Result.Count, st.Result.Packets, prefixed(", ", printable(st.Result.Error)))
	}
	service := "every user was served"
	if len(r.Down) > 0 {
		service = "users of " + strings.Join(r.Down, ", ") + " were not served"
	}
	if len(r.Stages) > 0 {
		fmt.Fprintf(w, "services   %s\n", service)
	}
	fmt.Fprintf(w, "reward     %.3f = format %.0f + execution %.0f + evaluation %.2f - penalty %.2f; correct: %v\n", r.Reward.Total(), r.Reward.Format, r.Reward.Execution,
		r.Reward.Evaluation, r.Reward.Penalty, r.Reward.Correct)
}

// printable shows what a policy wrote, or an attacker made it write, without
// letting it steer a terminal.
func printable(text string) string {
	if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) || r == utf8.RuneError }) {
		return strconv.Quote(text)
	}
	return text
}

func prefixed(prefix, text string) string {
	if text == "" {
		return ""
	}
	return prefix + text
}

func tactic(attack string) string {
	s, _ := scenario.ByName(attack)
	return s.Tactic
}

// effects describes what an action changes.
func effects(a scenario.Action) string {
	var out []string
	for _, e := range a.Effects {
		switch {
		case e.Rule != nil:
			out = append(out, fmt.Sprintf("rule %+v", *e.Rule))
		case e.Sysctl != nil:
			out = append(out, e.Sysctl.Key+"="+e.Sysctl.Value)
		case e.Setting != nil:
			out = append(out, e.Setting.Host+" "+e.Setting.Name)
		case e.Shape != nil:
			out = append(out, fmt.Sprintf("shape %+v", *e.Shape))
		}
	}
	return strings.Join(out, "; ")
}

// Replay plays a recorded episode on a field again and returns how it differed
// from the record; nothing when it came out the same.
func Replay(ctx context.Context, a *Agent, r Record) ([]string, error) {
	again := Episode{Incident: r.Incident, Completion: r.Completion}
	if err := a.try(ctx, &again); err != nil {
		return nil, err
	}
	var diff []string
	differs := func(what string, was, is any) {
		if fmt.Sprint(was) != fmt.Sprint(is) {
			diff = append(diff, fmt.Sprintf("%s: recorded %v, now %v", what, was, is))
		}
	}
	outcome := func(stages []scenario.StageOutcome) []string {
		var out []string
		for _, s := range stages {
			out = append(out, fmt.Sprintf("%s %v", s.Name, s.Succeeded))
		}
		return out
	}
	differs("void", r.Void, again.Void)
	differs("stages that succeeded", outcome(r.Stages), outcome(again.Stages))
	differs("executed", r.Feedback.Executed, again.Feedback.Executed)
	differs("attacked", r.Feedback.Attacked, again.Feedback.Attacked)
	differs("hosts down", slices.Sorted(slices.Values(r.Down)), slices.Sorted(slices.Values(again.Down)))
	differs("reward", r.Reward, again.Reward)
	return diff, nil
}
