package loop

import (
	"encoding/json"
	"testing"

	"trainerd/secloop"
	"trainerd/trainer"
)

func someSettings() Settings {
	return Settings{Objective: "sa_grpo", Weights: DefaultWeights(), LR: 1e-4, Temperature: 0.7, Steps: 4, Groups: 2, Size: 7, Most: 3, MaxPrompt: 64, MaxTokens: 32,
		MicroBatch: 4096, EvalIncidents: 1, EvalEvery: 1, Warm: Warm{Steps: 2, Rows: 2, Ahead: 1, Pool: 4, LR: 1e-3, Skill: 0.3, EOS: 256}}
}

// TestJobsAreAccepted has the server's own parser read the jobs of every
// objective and of every variant of a sweep.
func TestJobsAreAccepted(t *testing.T) {
	variants := Variants()
	for _, name := range []string{"dr_grpo", "cispo"} {
		variants = append(variants, Variant{name, func(s *Settings) { s.Objective = name }})
	}
	for _, v := range variants {
		s := someSettings()
		v.Change(&s)
		if err := s.Validate(); err != nil {
			t.Errorf("%s: %v", v.Name, err)
		}
		for _, doc := range []map[string]any{s.warmJob("dir:/m"), s.loopJob("dir:/m")} {
			raw, err := json.Marshal(doc)
			if err != nil {
				t.Fatal(err)
			}
			spec, err := trainer.ParseSpec(raw)
			if err != nil {
				t.Errorf("%s: %v", v.Name, err)
				continue
			}
			if spec.Objective.Name == "cross_entropy" {
				continue
			}
			for _, c := range secloop.Components {
				if spec.Objective.RewardWeights[c] != s.Weights[c] {
					t.Errorf("%s: weight of %s is %v, expected %v", v.Name, c, spec.Objective.RewardWeights[c], s.Weights[c])
				}
			}
			if spec.Objective.Name != s.Objective || int(spec.Objective.GroupSize) != s.Size {
				t.Errorf("%s: %s of %d", v.Name, spec.Objective.Name, spec.Objective.GroupSize)
			}
		}
		if base := someSettings(); base.Weights["penalty"] != -1 {
			t.Fatalf("%s changed the weights of others", v.Name)
		}
	}
}

func TestSettingsAreRefused(t *testing.T) {
	for name, change := range map[string]func(*Settings){
		"groups": func(s *Settings) { s.Groups = 0 }, "size": func(s *Settings) { s.Size = 0 }, "steps": func(s *Settings) { s.Steps = -1 },
		"lr": func(s *Settings) { s.LR = 0 }, "weights": func(s *Settings) { s.Weights["style"] = 1 }, "skill": func(s *Settings) { s.Warm.Skill = 2 },
		"eval": func(s *Settings) { s.EvalEvery = 0 }, "pool": func(s *Settings) { s.Warm.Pool = 0 },
	} {
		s := someSettings()
		change(&s)
		if s.Validate() == nil {
			t.Errorf("%s: accepted %+v", name, s)
		}
	}
}
