# Installs po_kernels/_build.py: what was built, or the reason why not.
function(install_build_record)
  cmake_parse_arguments(ARG "" "REASON;CUDA;CUDA_REASON" "LEVELS" ${ARGN})
  if(ARG_REASON)
    message(WARNING "po_kernels is installed without its C++ extension: ${ARG_REASON}")
    set(content "RECORD = {\"native\": False, \"reason\": \"${ARG_REASON}\"}\n")
  else()
    list(JOIN ARG_LEVELS "\", \"" levels)
    string(CONCAT content
      "RECORD = {\n"
      "    \"native\": True,\n"
      "    \"compiler\": \"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\",\n"
      "    \"simd\": [\"${levels}\"],\n"
      "    \"cuda\": \"${ARG_CUDA}\",\n"
      "    \"cuda_reason\": \"${ARG_CUDA_REASON}\",\n"
      "}\n")
  endif()
  file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/_build.py "${content}")
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_build.py DESTINATION po_kernels)
endfunction()
