package server

import (
	"net/http"
	"strconv"

	"github.com/labstack/echo/v4"

	"trainerd/internal/fault"
	"trainerd/trainer"
)

// maxJobDocument bounds a job document in bytes.
const maxJobDocument = 1 << 20

func (s *Server) createJob(c echo.Context) error {
	key, err := idempotencyKey(c)
	if err != nil {
		return err
	}
	if err := wantJSON(c); err != nil {
		return err
	}
	body, err := s.readBody(c, maxJobDocument, nil)
	if err != nil {
		return err
	}
	job, created, err := s.jobs.Create(c.Request().Context(), body, key)
	if err != nil {
		return err
	}
	status := http.StatusCreated
	if !created {
		status = http.StatusOK
	}
	c.Response().Header().Set("Location", "/v1/jobs/"+string(job.ID))
	return c.JSON(status, job.Status())
}

type jobList struct {
	Jobs []trainer.Status `json:"jobs"`
}

func (s *Server) listJobs(c echo.Context) error {
	list := jobList{Jobs: []trainer.Status{}}
	for _, j := range s.jobs.Jobs() {
		list.Jobs = append(list.Jobs, j.Status())
	}
	return c.JSON(http.StatusOK, list)
}

func (s *Server) getJob(c echo.Context) error {
	job, err := s.job(c)
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, job.Status())
}

func (s *Server) cancelJob(c echo.Context) error {
	job, err := s.job(c)
	if err != nil {
		return err
	}
	if err := job.Cancel(c.Request().Context()); err != nil {
		return err
	}
	return c.JSON(http.StatusOK, job.Status())
}

func (s *Server) pauseJob(c echo.Context) error  { return s.control(c, (*trainer.Job).Pause) }
func (s *Server) resumeJob(c echo.Context) error { return s.control(c, (*trainer.Job).Resume) }

func (s *Server) control(c echo.Context, do func(*trainer.Job) error) error {
	job, err := s.job(c)
	if err != nil {
		return err
	}
	if err := do(job); err != nil {
		return err
	}
	return c.JSON(http.StatusOK, job.Status())
}

type flushAnswer struct {
	Groups int `json:"groups"` // complete groups that will be trained
}

func (s *Server) flushJob(c echo.Context) error {
	job, err := s.job(c)
	if err != nil {
		return err
	}
	n, err := job.Flush()
	if err != nil {
		return err
	}
	return c.JSON(http.StatusAccepted, flushAnswer{Groups: n})
}

func (s *Server) postRollouts(c echo.Context) error {
	job, err := s.job(c)
	if err != nil {
		return err
	}
	key, err := idempotencyKey(c)
	if err != nil {
		return err
	}
	if err := wantArrow(c); err != nil {
		return err
	}
	if err := s.admit(c, job, key); err != nil {
		return err
	}
	body, err := s.readBody(c, s.jobs.Limits().MaxBatchBytes, s.bodies.take())
	if err != nil {
		return err
	}
	receipt, err := job.Submit(c.Request().Context(), body, key, s.bodies.give)
	if err != nil {
		return err
	}
	c.Response().Header().Set("Location", "/v1/jobs/"+string(job.ID)+"/batches/"+strconv.FormatUint(receipt.Batch, 10))
	return c.JSON(http.StatusAccepted, receipt)
}

func (s *Server) getBatch(c echo.Context) error {
	job, err := s.job(c)
	if err != nil {
		return err
	}
	seq, err := strconv.ParseUint(c.Param("batch"), 10, 64)
	if err != nil {
		return &fault.Error{Kind: fault.NotFound, Code: "batch_not_found", Msg: "no such batch",
			Fields: []fault.Field{{Name: "batch", Row: -1, Got: strconv.Quote(c.Param("batch")), Expected: "the id of an accepted batch"}}}
	}
	status, err := job.Batch(seq)
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, status)
}
