package loop

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"trainerd/internal/fault"
)

// Files of a run's directory.
const (
	fileRun      = "run.json"       // Settings and the run's own name
	fileEpisodes = "episodes.jsonl" // one Record a line
	filePoints   = "points.jsonl"   // one Point a line
	fileSteps    = "steps.jsonl"    // one StepRecord a line
	fileResult   = "result.json"
	dirPolicy    = "policy" // the last checkpoint as a Hugging Face directory
)

// Record is an episode as it is kept. A step that was played again after a
// crash has its lines twice; the later ones count.
type Record struct {
	Step   int64  `json:"step"` // that the episode was posted for
	Policy int64  `json:"policy"`
	Group  string `json:"group"`
	Index  int    `json:"index"`
	Prompt string `json:"prompt,omitempty"` // of the group's first episode only
	Episode
	Tokens    int  `json:"tokens"`
	Truncated bool `json:"truncated,omitempty"` // ended by the length limit
}

// StepRecord is one turn of the loop.
type StepRecord struct {
	Step     int64              `json:"step"`
	Policy   int64              `json:"policy"`
	Observe  float64            `json:"observe_s"`
	Sample   float64            `json:"sample_s"`
	Play     float64            `json:"play_s"`
	Train    float64            `json:"train_s"` // post, step and checkpoint
	Tally    Tally              `json:"tally"`
	Replaced int                `json:"replaced"` // groups whose field failed
	Metrics  map[string]float64 `json:"metrics"`
}

// appendLines writes values as JSON lines at a file's end, in one write.
func appendLines[T any](path string, values ...T) error {
	var b bytes.Buffer
	for _, v := range values {
		line, err := json.Marshal(v)
		if err != nil {
			return fmt.Errorf("write %s: %w", filepath.Base(path), err)
		}
		b.Write(append(line, '\n'))
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	end, err := mend(f)
	if err == nil {
		_, err = f.WriteAt(b.Bytes(), end)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", filepath.Base(path), err)
	}
	return f.Close()
}

// mend cuts off a last line that a killed process left without its end, and
// returns the file's length.
func mend(f *os.File) (int64, error) {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil || end == 0 {
		return end, err
	}
	at := end
	for buf := make([]byte, 4096); at > 0; {
		n := min(at, int64(len(buf)))
		if _, err := f.ReadAt(buf[:n], at-n); err != nil {
			return 0, err
		}
		if i := bytes.LastIndexByte(buf[:n], '\n'); i >= 0 {
			at = at - n + int64(i) + 1
			break
		}
		at -= n
	}
	if at == end {
		return end, nil
	}
	return at, f.Truncate(at)
}

// maxLine bounds one line of a record.
const maxLine = 8 << 20

// readLines calls f for each value of a file of JSON lines; none if there is no
// file. A last line without its end is not read.
func readLines[T any](path string, f func(T) error) error {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	r := bufio.NewReaderSize(file, 1<<16)
	for n := 1; ; n++ {
		line, err := line(r)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read %s, line %d: %w", filepath.Base(path), n, err)
		}
		var v T
		if err := json.Unmarshal(line, &v); err != nil {
			return fault.New(fault.Malformed, "bad_record", "read %s, line %d: %v", filepath.Base(path), n, err)
		}
		if err := f(v); err != nil {
			return err
		}
	}
}

// line reads one whole line; io.EOF for what is not whole.
func line(r *bufio.Reader) ([]byte, error) {
	var out []byte
	for {
		part, err := r.ReadSlice('\n')
		out = append(out, part...)
		switch {
		case err == nil:
			return out, nil
		case err != bufio.ErrBufferFull:
			return nil, err
		case len(out) > maxLine:
			return nil, fault.New(fault.TooLarge, "bad_record", "longer than %d bytes", maxLine)
		}
	}
}

// writeJSON replaces a file by a value, whole or not at all.
func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", filepath.Base(path), err)
	}
	return writeFile(path, append(b, '\n'))
}

func writeFile(path string, b []byte) error {
	tmp := path + ".part"
	if err := os.WriteFile(tmp, b, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
