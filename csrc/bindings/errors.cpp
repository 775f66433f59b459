#include <string>

#include "bindings/bindings.hpp"
#include "bindings/named_error.hpp"
#include "host/control.hpp"
#include "host/message.hpp"

namespace py = pybind11;

namespace pipex {
namespace {

PyObject* aborted_type;
PyObject* mismatch_type;

py::bytes to_bytes(const MessageHeader& header) { return {reinterpret_cast<const char*>(&header), sizeof header}; }

void raise(const Aborted& error) {
  const AbortRecord& record = error.record;
  const auto text = py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(record.text, static_cast<Py_ssize_t>(std::string_view(record.text).size()), "replace"));
  PyErr_SetObject(
      aborted_type,
      py::make_tuple(name(record.kind), record.culprit, record.progress.step, record.progress.position, text).ptr());
}

}  // namespace

void bind_errors(py::module_& module) {
  aborted_type = PyErr_NewExceptionWithDoc("pipex._native.Aborted",
                                           "The run has ended; args are (kind, culprit, step, position, text).",
                                           PyExc_Exception, nullptr);
  mismatch_type = PyErr_NewExceptionWithDoc("pipex._native.HeaderMismatch",
                                            "Another message arrived; args are both headers (got, needed).",
                                            PyExc_Exception, nullptr);
  module.attr("Aborted") = py::handle(aborted_type);
  module.attr("HeaderMismatch") = py::handle(mismatch_type);
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const NamedError& error) {
      raise(error);
    } catch (const Aborted& error) {
      raise(error);
    } catch (const HeaderMismatch& error) {
      PyErr_SetObject(mismatch_type, py::make_tuple(to_bytes(error.got), to_bytes(error.needed)).ptr());
    }
  });
}

}  // namespace pipex
