package bench

import (
	"bytes"
	"math"
	"strings"
	"testing"
	"time"

	"trainerd/internal/fault"
)

// TestIngest runs the benchmark small, with the producers in this process, and
// holds what it says to arithmetic.
func TestIngest(t *testing.T) {
	for _, ids := range []bool{false, true} {
		o := IngestOptions{Rows: 256, BatchRows: 32, GroupSize: 4, Prompt: 8, Completion: 24, Producers: 3, RowIDs: ids, Dir: t.TempDir(), StageTime: time.Millisecond}
		r, err := Ingest(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if least := 32 * 4 * (8 + 24 + 24); r.BatchBytes < least || r.BatchBytes > least+32*100+4096 {
			t.Errorf("a body of %d bytes, whose values take %d", r.BatchBytes, least)
		}
		if r.Steps != 8 { // a step a batch
			t.Errorf("%d steps, expected 8", r.Steps)
		}
		sent := float64(8*r.BatchBytes) / 1e6
		if math.Abs(r.MBs*r.Seconds-sent) > 1e-6*sent || math.Abs(r.MBsCore*r.CPUSeconds-sent) > 1e-6*sent || math.Abs(r.RowsS*r.Seconds-256) > 1e-3 {
			t.Errorf("rates do not give the %v MB sent: %+v", sent, r)
		}
		if r.Accept["p50"] <= 0 || r.Accept["p99"] < r.Accept["p50"] || r.DiskOneMBs <= 0 || r.DiskMBs <= 0 || r.RSSPeakMB < r.RSSStartMB || r.RSSEndMB <= 0 {
			t.Errorf("%+v", r)
		}
		sum := r.RestNs
		names := map[string]bool{}
		for _, s := range r.Stages {
			names[s.Stage] = true
			if s.NsByte <= 0 || s.BestNs > s.NsByte {
				t.Errorf("stage %s took %v ns a byte, at best %v", s.Stage, s.NsByte, s.BestNs)
			}
			if s.InPath {
				sum += s.NsByte
			}
		}
		if all := 1e3 / r.MBsCore; math.Abs(sum-all) > 1e-6*all {
			t.Errorf("stages and rest sum to %v ns a byte, expected %v", sum, all)
		}
		for _, name := range []string{"mark", "decode and validate", "assemble", "prepare a step"} {
			if !names[name] {
				t.Errorf("no stage %q", name)
			}
		}
		var out bytes.Buffer
		if err := r.Table(&out); err != nil || !strings.Contains(out.String(), "per core") {
			t.Errorf("%s, %v", out.String(), err)
		}
	}
}

func TestIngestNamesWhatCannotBe(t *testing.T) {
	good := IngestOptions{Rows: 64, BatchRows: 32, GroupSize: 4, Prompt: 8, Completion: 24, Producers: 1, Dir: t.TempDir(), StageTime: time.Millisecond}
	for name, change := range map[string]func(*IngestOptions){
		"group-size": func(o *IngestOptions) { o.GroupSize = 0 },
		"batch":      func(o *IngestOptions) { o.BatchRows = 30 },
		"rows":       func(o *IngestOptions) { o.Rows = 65 },
		"prompt":     func(o *IngestOptions) { o.Prompt = 0 },
		"completion": func(o *IngestOptions) { o.Completion = ingestMaxTokens },
		"producers":  func(o *IngestOptions) { o.Producers = 0 },
		"stage-time": func(o *IngestOptions) { o.StageTime = 0 },
	} {
		o := good
		change(&o)
		_, err := Ingest(t.Context(), o)
		f, ok := fault.As(err)
		if !ok || len(f.Fields) != 1 || f.Fields[0].Name != name {
			t.Errorf("%s: %v", name, err)
		}
	}
}
